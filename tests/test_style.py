"""The style of the code, counted: short lines and exported cells, one idea a line, wings that import downwards."""
import ast
import re

import pytest
from test_project import LIBRARY, MINIATURE, NOTEBOOKS, ROOT, cells, name, run, source

PACKAGE = ROOT/"bridgexfer"
MODULES = [p for p in sorted(PACKAGE.rglob("*.py")) if p.name != "_modidx.py"]
COLUMNS = 120
CALLS = (ast.Call, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def module_name(path): return path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")


def offences(found):
    "A message with every offence on a line of its own."
    lines = list(found)
    return "\n".join([f"{len(lines)} offences", *lines])


# ---- lines

def test_ruff():
    done = run("ruff", "check", "--output-format", "concise")
    assert done.returncode == 0, done.stdout


def test_lines_of_the_package_are_short():
    "The notebooks' are checked by ruff; the package is generated, and its docstrings come from the notebooks' titles."
    def written(path): # without the list of names, whose lines are nbdev's
        return re.sub(r"__all__ = \[.*?\]", lambda m: "\n" * m[0].count("\n"), path.read_text(), flags=re.S)
    found = [f"{path.relative_to(ROOT)}:{number}: {len(line)} columns" for path in MODULES
             for number, line in enumerate(written(path).splitlines(), 1) if len(line) > COLUMNS]
    assert not found, offences(found)


def parsed(code):
    "Code of a cell as a tree; magics count as nothing."
    plain = ["pass" if line.lstrip().startswith(("%", "!")) else line for line in code.splitlines()]
    return ast.parse("\n".join(plain))


def works(node): return any(isinstance(n, CALLS) for n in ast.walk(node))


def two_ideas(tree):
    "Lines that have to be read twice: (line, what)."
    for n in ast.walk(tree):
        if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Tuple) and isinstance(n.value, ast.Tuple):
            if any(map(works, n.value.elts)): yield n.lineno, "parallel assignment of calls"
        if isinstance(n, (ast.For, ast.comprehension)) and isinstance(n.iter, (ast.List, ast.Tuple)):
            if len(n.iter.elts) == 1: yield n.iter.lineno, "a loop over one item, used as a let"
        if isinstance(n, ast.Starred) and isinstance(n.value, ast.IfExp):
            yield n.lineno, "a star before a conditional: name the fields"


def test_one_idea_a_line():
    found = []
    for notebook in NOTEBOOKS:
        for number, cell in enumerate(cells(notebook)):
            lines = source(cell).splitlines()
            for at, what in two_ideas(parsed(source(cell))):
                found.append(f"{name(notebook)}, code cell {number}: {what}: {lines[at - 1].strip()[:90]}")
    assert not found, offences(found)


@pytest.mark.parametrize(("code", "count"), [
    ("a, b = f(x), g(y)", 1), ("a, b = 1, 2", 0), ("a, b = pair(x)", 0), ("for x in [f(y)]: print(x)", 1),
    ("z = [x for y in ys for x in [f(y)]]", 1), ("f(*((1, 2) if a else (3,)))", 1), ("f(*args)", 0)])
def test_offences_are_noticed(code, count): assert len(list(two_ideas(ast.parse(code)))) == count


# ---- cells

def exported_sizes():
    "(non-blank lines, where) of each exported cell."
    for notebook in [*LIBRARY, *MINIATURE]:
        for number, cell in enumerate(cells(notebook)):
            if not re.search(r"^#\| *export\b", source(cell), re.M): continue
            lines = [line for line in source(cell).splitlines() if line.strip() and not line.startswith("#|")]
            yield len(lines), f"{name(notebook)}, code cell {number}"


def test_exported_cells_are_short():
    sizes = list(exported_sizes())
    long = [f"{where}: {n} lines" for n, where in sizes if n > 35]
    assert not long, offences(long)
    mean = sum(n for n, _ in sizes)/len(sizes)
    assert len(sizes) > 250 and mean <= 11, f"{len(sizes)} exported cells of {mean:.1f} lines on average"


# ---- wings

def relative_imports(tree, package):
    "The modules that a module of a package imports; package: names below bridgexfer."
    for n in ast.walk(tree):
        if not isinstance(n, ast.ImportFrom) or not n.level: continue
        above = package[:len(package) + 1 - n.level]
        yield from (".".join([*above, part]) for part in ([n.module] if n.module else [a.name for a in n.names]))


def test_modules_import_only_what_comes_before_them():
    library = [p for p in LIBRARY if p.parent.name == "library"]
    others = [p for p in LIBRARY if p.parent.name != "library"]
    code = "\n".join(source(cell) for path in [*library, *MINIATURE, *others] for cell in cells(path))
    order = re.findall(r"^#\| default_exp (\S+)", code, re.M)
    assert len(order) == len(set(order)) > 25
    for place, module in enumerate(order):
        tree = ast.parse((PACKAGE/f"{module.replace('.', '/')}.py").read_text())
        late = set(relative_imports(tree, module.split(".")[:-1])) & set(order[place:])
        assert not late, f"{module} imports {', '.join(late)}, which comes later"


def takes_settings(function):
    "Whether a parameter of a function is the study's settings."
    arguments = function.args
    for a in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
        kind = ast.unparse(a.annotation) if a.annotation else ""
        if a.arg == "settings" or re.search(r"\b(Settings|Study)\b", kind): return True
    return False


def test_only_study_and_apps_take_settings():
    found = []
    for path in MODULES:
        if module_name(path).startswith("study.") or module_name(path) in ("own_images", "budget", "cli"): continue
        functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
        found += [f"{module_name(path)}.{f.name}" for f in functions if takes_settings(f)]
    assert not found, offences(found)


def test_few_modules_know_the_miniature():
    outside = [p for p in MODULES if p.parent.name != "miniature"]
    found = [module_name(p) for p in outside if re.search("miniature", p.read_text(), re.I)]
    assert len(found) <= 3, f"{len(found)} modules say \"miniature\": {', '.join(found)}"


def test_no_module_parses_source_text():
    "Modules and the Snakefile take what they need to know from objects, not from the text of other files."
    tools = r"\bast\.(parse|walk)\b|\bgetsource\w*\(|\btokenize\."
    files = r"""["'](?:[\w./]*/)?(?:Snakefile|\w+\.py)["']"""
    readers = [p for p in MODULES if p.name != "artefacts.py"] # which hashes code without its comments
    found = [f"{path.relative_to(ROOT)}: {match[0]}" for path in [*readers, ROOT/"Snakefile"]
             for match in re.finditer(f"{tools}|{files}", path.read_text())]
    assert not found, offences(found)


# ---- files are UTF-8 wherever the code runs

TEXT_METHODS = {"read_text": 0, "write_text": 1} # method -> arguments before the encoding


def text_without_encoding(tree):
    "Lines that read or write text in the encoding of whatever locale they run in."
    for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
        words = {k.arg: k.value for k in call.keywords}
        called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        if "encoding" in words: continue
        if called in TEXT_METHODS and len(call.args) <= TEXT_METHODS[called]: yield call.lineno
        if isinstance(words.get("text"), ast.Constant) and words["text"].value: yield call.lineno # of a subprocess
        if isinstance(call.func, ast.Name) and called == "open":
            mode = call.args[1] if len(call.args) > 1 else words.get("mode")
            if "b" not in (ast.unparse(mode) if mode else ""): yield call.lineno


def test_text_is_utf8_in_every_locale():
    sources = {p.relative_to(ROOT): p.read_text(encoding="utf-8") for p in [*MODULES, *sorted(ROOT.glob("docs/*.py"))]}
    run_by_study = [p for wing in ("jobs", "paper", "benchmarks") for p in ROOT.glob(f"nbs/{wing}/*.ipynb")]
    for notebook in run_by_study: sources[name(notebook)] = "\n".join(source(c) for c in cells(notebook))
    found = [f"{where}:{line}" for where, code in sources.items() for line in text_without_encoding(parsed(code))]
    assert not found, offences(found)


@pytest.mark.parametrize(("code", "count"), [
    ("p.read_text()", 1), ("p.write_text(t)", 1), ("p.write_text(t, encoding='utf-8')", 0), ("open(p)", 1),
    ("open(p, 'rb')", 0), ("open(p, 'a')", 1), ("open(p, 'ab' if have else 'wb')", 0), ("run(x, text=True)", 1)])
def test_missing_encodings_are_noticed(code, count): assert len(list(text_without_encoding(ast.parse(code)))) == count
