"""What is shipped of every kernel, a file each, named as the kernel's `triton_<name>.py`: cases for compile.py."""
