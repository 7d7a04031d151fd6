"""Where the torch and torchvision of the Python that runs this are, for `make env TORCH=keep`: folders, one a line."""
import re
import sys
from pathlib import Path

try: import torch, torchvision
except ImportError as error: sys.exit(f"TORCH=keep: {sys.executable} cannot import torch and torchvision ({error}): "
                                      "install them there, or name a Python that has them with PYTHON=.")
for module in (torch, torchvision):
    ours = module.__version__.partition("+")[0]
    locked = re.search(rf"^{module.__name__}==(\S+)", Path(sys.argv[1]).read_text(encoding="utf-8"), re.M)[1]
    if ours != locked: print(f"{module.__name__} {ours} is kept, the lock has {locked}: results may differ in their "
                             "last digits.", file=sys.stderr)
print(*dict.fromkeys(str(Path(module.__file__).parents[1]) for module in (torch, torchvision)), sep="\n")
