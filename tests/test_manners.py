"""How commands behave in scripts: one JSON value, no progress bars in pipes, and what an interruption leaves."""
import json
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
from tqdm import tqdm

from bridgexfer.cli import WithoutBars, _answer, _rows, app, main
from bridgexfer.interruptions import KEPT, interrupted

ROOT = Path(__file__).parents[1]


def strict(text): # JSON without NaN, as every parser reads it
    def reject(word): raise ValueError(f"{word} is not JSON")
    return json.loads(text, parse_constant=reject)


@pytest.mark.parametrize("argv", [["plan", "profile=evening", "--json"], ["table", "profile=miniature", "--json"]])
def test_tables_are_one_json_value(argv, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(argv) == 0
    rows = strict(capsys.readouterr().out)
    assert len(rows) > 2 and all(isinstance(row, dict) for row in rows)


def test_what_a_table_lacks_is_null(capsys):
    _answer(0, _rows(pd.DataFrame({"lr": [.1, None], "name": ["ä", None]})), "", as_json=True)
    assert strict(capsys.readouterr().out) == [{"lr": .1, "name": "ä"}, {"lr": None, "name": None}]


def test_pipes_get_no_bars():
    err = WithoutBars(StringIO())
    print("before", file=err)
    for _ in tqdm(range(3), desc="outer", file=err, mininterval=0):
        for _ in tqdm(range(2), desc="inner", file=err, mininterval=0, leave=False, position=1): pass
    print("\nafter\n", file=err)
    assert err.getvalue() == "before\n\nafter\n\n"


def test_commands_that_keep_something_say_so():
    commands = {c.callback.__name__ for c in app.registered_commands}
    assert set(KEPT) < commands
    for name in commands:
        said = interrupted([name, "--json"])
        assert "run the same command again" in said and ("resume" in said) == (name in KEPT)
