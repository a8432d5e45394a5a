"""The C library's allocator, told to keep what a process frees for what it asks for next."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h; see mallopt(3)
LARGEST = 2**31 - 1  # an int, in bytes


def keep_freed_memory() -> bool:
    """Tensors of up to 2 GiB, freed, stay with the process, for the next ones; True where the C library can (glibc).

    As it is, a block of more than 32 MiB comes from the kernel and goes back to it, and so does the free end of the
    heap: a forward over a long text, whose activations are of that size, has the kernel clear the same gigabytes
    layer after layer. It is the process's own affair, so the command line does it and the library does not.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all([mallopt(M_MMAP_THRESHOLD, LARGEST) == 1, mallopt(M_TRIM_THRESHOLD, LARGEST) == 1])
