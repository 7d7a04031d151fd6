"""Every text that a user can see, from the sources: errors, notices, help, findings.

    python docs/messages.py > messages.md"""
import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEAST = 3 # words of a text; shorter ones are names and keys


def spoken(node: ast.AST) -> str: # "" if it is no text
    "A text as its reader sees it, with the code of what is filled in."
    if isinstance(node, ast.Constant): return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.FormattedValue): return f"{{{ast.unparse(node.value)}}}"
    if isinstance(node, ast.JoinedStr): return "".join(map(spoken, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add): return spoken(node.left) + spoken(node.right)
    return ""


def docstrings(tree: ast.AST) -> set[int]: # ids of nodes
    "Those of functions that are no command: a command's is its help."
    found = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list) or not body or not isinstance(body[0], ast.Expr): continue
        command = any("app.command" in ast.unparse(d) for d in getattr(node, "decorator_list", ()))
        if not command: found.add(id(body[0].value))
    return found


def texts(tree: ast.AST) -> Iterator[tuple[int, str, str]]: # line, what it is given to, text
    "The texts of a module, each once and whole."
    seen = docstrings(tree)
    def visit(node, caller):
        if isinstance(node, ast.Call): caller = ast.unparse(node.func).rpartition(".")[2]
        text = "" if id(node) in seen else spoken(node)
        if len(text.split()) >= LEAST: yield node.lineno, caller, " ".join(text.split())
        if text or id(node) in seen: return
        for child in ast.iter_child_nodes(node): yield from visit(child, caller)
    yield from visit(tree, "")


def page() -> str: # Markdown
    "The list, by module."
    lines = ["# Messages", "", "What a user can be told, generated from the sources by `python docs/messages.py`.", ""]
    for path in sorted((ROOT/"bridgexfer").rglob("*.py")):
        found = list(texts(ast.parse(path.read_text(encoding="utf-8"))))
        if not found: continue
        lines += [f"## {path.relative_to(ROOT)}", ""]
        lines += [f"- {line}, {caller or 'text'}: {text}" for line, caller, text in found] + [""]
    return "\n".join(lines)


if __name__ == "__main__": print(page())
