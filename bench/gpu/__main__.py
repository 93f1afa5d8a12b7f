"""Run one section: python -m gpu NAME RECORD WORK [--cpu]"""
import importlib
import sys
import traceback
from pathlib import Path

from gpu.record import Record

name, file, work, *flags = sys.argv[1:]
record = Record(Path(file), Path(work), "--cpu" not in flags)
try:
    importlib.import_module(f"gpu.{name}").run(record)
except BaseException:
    record.fail(traceback.format_exc())
    raise
if record.error:
    sys.exit(record.error)
