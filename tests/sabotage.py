"""Pictures that crash, hang, hold or slow down the real decoder, in every process of a test."""

from __future__ import annotations

from pathlib import Path

#: Every Python process imports a module of this name when it finds one. It makes the real
#: decoder do what a mark behind the end of a picture says, in workers and children alike.
_SABOTAGE = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != "toolkit.images.decode":
            return None
        sys.meta_path.remove(self)
        import ctypes, importlib.util, time
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            decode = module.decode
            def sabotaged(data, **options):
                if data.endswith(b"CRASH"):
                    ctypes.string_at(0)
                if data.endswith(b"HANG"):
                    time.sleep(3600)
                if data.endswith(b"GRAB"):
                    ctypes.PyDLL(None).sleep(3600)
                if data.endswith(b"SLOW"):
                    time.sleep(0.02)
                return decode(data, **options)
            module.decode = sabotaged
        spec.loader.exec_module = exec_module
        return spec
sys.meta_path.insert(0, Finder())
"""


def write_sabotage(folder: Path) -> Path:
    """Write the module into a new folder, which is to be put on ``PYTHONPATH``."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_SABOTAGE)
    return folder
