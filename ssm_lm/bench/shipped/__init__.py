"""What is shipped of every kernel, a file each, named as the kernel's `triton_<name>.py`: cases for compile.py."""


def as_compiled(tiles: dict[str, int], **constants) -> dict[str, dict]:
    """The keys of a case that `tiles`, as a launcher gives them, and other constants make: constexprs, options."""
    return {
        "constexprs": constants | {key: value for key, value in tiles.items() if key.isupper()},
        "options": {key: value for key, value in tiles.items() if key.islower()},
    }
