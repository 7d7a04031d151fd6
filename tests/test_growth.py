"""What figures/growth.csv and memory.csv say of memory, which takes hours to measure again."""
import json
import re

import pandas as pd

from bridgexfer.study.grid import Study, resources
from test_project import ROOT

GROWTH = ROOT/"nbs/benchmarks/growth.ipynb"


def asked(name):
    "What `make bench` measures: a parameter of the notebook."
    text = (ROOT/"Makefile").read_text(encoding="utf-8")
    return re.search(rf'^cpu_growth(?:.*\\\n)*.*?-p {name} ("[^"]+"|\S+)', text, re.M)[1].strip('"')


def files_of_the_notebook():
    "Its function `distinct`, which makes image files."
    cells = ["".join(cell["source"]) for cell in json.loads(GROWTH.read_text(encoding="utf-8"))["cells"]]
    [code] = [found[1] for cell in cells if (found := re.search(r'^files = """\n(.*?)^"""', cell, re.M | re.S))]
    space = {}
    exec(code, space)
    return space["distinct"]


def test_training_on_four_times_what_is_held_takes_no_more_memory():
    table = pd.read_csv(ROOT/"figures/growth.csv")
    trained = table[table.work == "training for an epoch"].sort_values("images")
    assert trained.images.tolist() == [int(n) for n in asked("read").split()]
    [file] = files_of_the_notebook()(1, int(asked("size")))
    times = trained.images * len(file) / 1e6 / float(asked("limit")) # of the bound
    beyond = trained.megabytes[times > 1]
    assert times.max() >= 4 and len(beyond) >= 3 and (times <= 1).any()
    assert beyond.max() < 1.1 * beyond.min() # flat
    assert beyond.max() < trained.megabytes[times <= 1].max() # and no more than a set that is held


def test_jobs_of_the_paper_request_more_than_they_need_and_say_how_much_that_is():
    table = pd.read_csv(ROOT/"figures/memory.csv").set_index("job")
    study = Study("paper")
    keys = {job: "generate" if "generating" in job else "invert" if "learning" in job else "" for job in table.index}
    for job, row in table.iterrows():
        needed = row["with libraries and CUDA"]
        assert needed < row.requested == resources(study, keys[job] or "transfer")["mem_mb"] / 1000
        reason = study.settings.reason["_".join(filter(None, [keys[job], "memory"]))]
        assert f"{needed:.0f} GB" in reason
