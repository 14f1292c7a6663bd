"""CUDA kernels, compiled by NVRTC through CuPy for the GPU at hand (sources in `csrc/cuda`).

`limits` and `geometry` are plain Python: what the kernels serve, and the sizes of a launch.
`sources` assembles the text of a kernel. `launch` compiles it at first use (CuPy keeps the result
on disk) and runs it on torch's current stream; it and the launchers import CuPy when they run,
never when they are imported. `arrays` has the operations for arrays of CuPy and other libraries.
"""
