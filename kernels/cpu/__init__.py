"""Launchers of the native CPU kernels (`pyflocality._C`, sources in `csrc/cpu`).

A launcher hands the memory of its tensors to the kernel without a copy and runs it on
`torch.get_num_threads()` threads. All of them take `instruction_set`, one of
`pyflocality._C.instruction_sets()`; None takes the best that this machine has.
"""
