"""Native sources that are compiled where they run, installed as the package `pyflocality.csrc`.

The wheel carries the CUDA sources (`cuda/*.cu`) and the headers they include (`include/`) as
data, for NVRTC to compile for the GPU at hand. `importlib.resources.files("pyflocality.csrc")`
finds them in an installed package and in a checkout alike.
"""
