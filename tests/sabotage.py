"""Pictures that crash, hang, hold or slow down the real decoder, in every process of a test.

And an engine that crashes while it takes a model.
"""

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


#: The same for OpenVINO: after it has taken a model, the process dies of the next signal in the
#: file ``deaths``, or of an export that a test has marked.
_ENGINE_SABOTAGE = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != "toolkit.embedding.openvino_model":
            return None
        sys.meta_path.remove(self)
        import ctypes, importlib.util, os, pathlib, signal
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        deaths = pathlib.Path(__file__).with_name("deaths")
        def exec_module(module):
            load(module)
            take = module.OpenVinoModel.__init__
            def crashing(self, folder, *args):
                if (folder / module.MODEL_FILE).read_bytes().endswith(b"CRASH"):
                    ctypes.string_at(0)
                take(self, folder, *args)
                how, *rest = deaths.read_text().split() or [None]
                deaths.write_text(" ".join(rest))
                if how == "SIGSEGV":
                    ctypes.string_at(0)
                if how:
                    os.kill(os.getpid(), signal.Signals[how])
            module.OpenVinoModel.__init__ = crashing
        spec.loader.exec_module = exec_module
        return spec
sys.meta_path.insert(0, Finder())
"""


def write_engine_sabotage(folder: Path) -> Path:
    """Write that module into a new folder, for ``PYTHONPATH``, and give the file ``deaths``."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_ENGINE_SABOTAGE)
    deaths = folder / "deaths"
    deaths.write_text("")
    return deaths
