"""The `hf-kprune` program. hf_kprune is imported as a whole when a command runs; `--help` answers at once."""

import sys
from importlib.util import find_spec, module_from_spec


def main() -> int:
    """Run `sys.argv` and return the exit code."""
    try:
        spec = find_spec("hf_kprune")
        assert spec is not None
        assert spec.loader is not None
        package, load = module_from_spec(spec), spec.loader.exec_module
        sys.modules["hf_kprune"] = package  # its modules can be imported before what __init__ imports

        from hf_kprune.cli.terminal import main

        return main(load=lambda: load(package))
    except KeyboardInterrupt:  # so early that nothing of ours was there to say it
        sys.stderr.write("hf-kprune: interrupted\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
