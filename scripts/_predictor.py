"""Read predict.py as Cog's build reads it: parsed, never imported, literals only.

Cog takes what it can read and drops the rest without a word: a computed default makes its input required, a `ge`
that is a name is gone. Here each such thing is a PredictorError with its line. What is accepted means the same to
Cog and to Python. The rules are those of pkg/schema and pkg/schema/python in replicate/cog, version 0.23.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

PRIMITIVES: dict[str, dict[str, Any]] = {
    "bool": {"type": "boolean"},
    "float": {"type": "number"},
    "int": {"type": "integer"},
    "str": {"type": "string"},
    "Path": {"type": "string", "format": "uri"},
    "File": {"type": "string", "format": "uri"},
    "Secret": {"type": "string", "format": "password", "writeOnly": True, "x-cog-secret": True},
    "Any": {"type": "object"},
    "dict": {"type": "object"},
    "Dict": {"type": "object"},
}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_LIMITS = {"ge": "minimum", "le": "maximum", "min_length": "minLength", "max_length": "maxLength"}
_TEXTS = {"description": "description", "regex": "pattern", "accept": "x-cog-accept"}


class PredictorError(ValueError):
    """predict.py says something that Cog would misread, drop or refuse. The message has the line and what to write."""


@dataclass(frozen=True, kw_only=True)
class Field:
    """One input. `schema` is its type in JSON Schema; `keywords` are the further ones, by their names there."""

    name: str
    schema: dict[str, Any]
    nullable: bool = False
    has_default: bool = False
    default: Any = None
    choices: tuple[Any, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)

    @property
    def required(self) -> bool:
        return not (self.has_default or self.nullable)

    @property
    def type(self) -> str:
        """Of one value: "string", "integer", "number", "boolean" or "object"; of a list, its items'."""
        return str(self.schema.get("items", self.schema)["type"])


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """What predict.py declares: inputs in order, the output's JSON Schema, whether it streams."""

    inputs: dict[str, Field]
    output: dict[str, Any]
    streaming: bool


def read(path: Path, name: str = "Predictor") -> Predictor:
    """The class `name` in `path`. Raises PredictorError."""
    return _Reader(path.name, path.read_text(encoding="utf-8")).predictor(name)


class _Reader:
    def __init__(self, file: str, source: str) -> None:
        self.file, self.source = file, source
        try:
            self.module = ast.parse(source)
        except SyntaxError as error:
            raise PredictorError(f"{file}:{error.lineno}: {error.msg}") from None
        self.imports: dict[str, tuple[str, str]] = {}  # local name -> module, name there
        self.scope: dict[str, ast.expr] = {}
        for node in self.module.body:
            if isinstance(node, ast.ImportFrom):
                self.imports |= {
                    a.asname or a.name: ("." * node.level + (node.module or ""), a.name) for a in node.names
                }
            elif isinstance(node, ast.Import):
                self.imports |= {a.asname or a.name: (a.name, a.name) for a in node.names}
            elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                self.scope[node.targets[0].id] = node.value
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
                self.scope[node.target.id] = node.value

    def predictor(self, name: str) -> Predictor:
        classes = [n for n in self.module.body if isinstance(n, ast.ClassDef) and n.name == name]
        if not classes:
            raise PredictorError(f"{self.file} has no class {name}")
        methods = {n.name: n for n in classes[0].body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
        method = methods.get("run") or methods.get("predict")
        if method is None:
            self.refuse(classes[0], f"{name} must define predict()")
        arguments = method.args
        if arguments.vararg or arguments.kwarg:
            self.refuse(method, "*args and **kwargs can't be inputs")
        parameters = [*arguments.posonlyargs, *arguments.args]
        defaults: list[ast.expr | None] = [None] * (len(parameters) - len(arguments.defaults))
        pairs = list(zip(parameters, [*defaults, *arguments.defaults], strict=True))
        pairs += zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        streaming = self.decorators(method)
        return Predictor(
            inputs={p.arg: self.input(p, default) for p, default in pairs if p.arg != "self"},
            output=self.output(method, streaming=streaming),
            streaming=streaming,
        )

    def decorators(self, method: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
        """Whether the method streams. Any decorator but Cog's own hides the inputs' defaults from the server."""
        streaming = False
        for node in method.decorator_list:
            target = node.func if isinstance(node, ast.Call) else node
            what = ast.unparse(target)
            module, _, member = what.rpartition(".")
            origin = (self.imports.get(module, ("", ""))[0], member) if module else self.imports.get(what)
            if origin == ("cog", "streaming"):
                streaming = True
            elif origin == ("cog", "concurrent"):
                self.concurrent(node, is_async=isinstance(method, ast.AsyncFunctionDef))
            else:
                self.refuse(node, f"@{what} on {method.name}: with a decorator other than cog's, omitted inputs arrive "
                                  "as FieldInfo objects; use a with statement inside")  # fmt: skip
        return streaming

    def concurrent(self, node: ast.expr, *, is_async: bool) -> None:
        if not isinstance(node, ast.Call) or not (node.args or node.keywords):
            return
        if node.args or [k.arg for k in node.keywords] != ["max"]:
            self.refuse(node, "@cog.concurrent takes max=N alone")
        number = self.literal(node.keywords[0].value, "max")
        if type(number) is not int or number < 1:
            self.refuse(node, "@cog.concurrent(max=...) must be a whole number from 1")
        if number > 1 and not is_async:
            self.refuse(node, "@cog.concurrent(max > 1) needs an async predict()")

    def input(self, parameter: ast.arg, value: ast.expr | None) -> Field:
        name = parameter.arg
        if parameter.annotation is None:
            self.refuse(parameter, f"input {name} has no type annotation")
        schema, nullable = self.input_type(parameter.annotation)
        keywords: dict[str, Any] = {}
        choices: tuple[Any, ...] = ()
        default: ast.expr | None = value
        if isinstance(value, ast.Call):
            if not (isinstance(value.func, ast.Name) and self.imports.get(value.func.id) == ("cog", "Input")):
                self.refuse(value, f"input {name}: only a literal or Input(...), imported from cog, can stand here")
            default = None
            if value.args:
                self.refuse(value, f"input {name}: Input() takes keywords only, Cog drops the rest")
            for keyword in value.keywords:
                if keyword.arg == "default":
                    default = keyword.value
                elif keyword.arg == "choices":
                    choices = self.choices(keyword.value, name)
                else:
                    keywords |= self.keyword(keyword, name, schema)
        made = self.literal(default, f"input {name}: default") if default is not None else None
        # The one None that Cog keeps without Optional: a secret that may be left out.
        nullable = nullable or (default is not None and made is None and schema == PRIMITIVES["Secret"])
        if default is not None and made is None and not nullable:
            self.refuse(default, f"input {name}: with default None it must be Optional, else Cog makes it required")
        result = Field(
            name=name,
            schema=schema,
            nullable=nullable,
            has_default=default is not None,
            default=made,
            choices=choices,
            keywords=keywords,
        )
        self.check(result, parameter)
        return result

    def keyword(self, keyword: ast.keyword, name: str, schema: dict[str, Any]) -> dict[str, Any]:
        """One keyword of Input() as a keyword of JSON Schema."""
        what, node = f"input {name}: {keyword.arg}", keyword.value
        if keyword.arg in _LIMITS:
            number = self.literal(node, what, names=False)
            if type(number) not in (int, float):
                self.refuse(node, f"{what} must be a number")
            whole = keyword.arg in ("min_length", "max_length")
            if whole and (type(number) is not int or number < 0):
                self.refuse(node, f"{what} must be a whole number from 0")
            return {_LIMITS[keyword.arg]: number}
        if keyword.arg in _TEXTS:
            text = self.literal(node, what, names=keyword.arg == "description")
            if not isinstance(text, str):
                self.refuse(node, f"{what} must be text")
            if keyword.arg == "accept" and schema.get("items", schema).get("format") != "uri":
                self.refuse(node, f"{what} is for Path and File inputs only")
            return {_TEXTS[keyword.arg]: text}
        if keyword.arg == "deprecated":
            flag = self.literal(node, what, names=False)
            if not isinstance(flag, bool):
                self.refuse(node, f"{what} must be True or False")
            return {"deprecated": True} if flag else {}
        self.refuse(node, f"{what} is not something Cog reads")

    def check(self, given: Field, node: ast.AST) -> None:
        """What Cog does not check itself: a default that its own input would refuse."""
        if given.choices and given.schema["type"] in ("array", "object"):
            self.refuse(node, f"input {given.name}: choices go with a single value")
        if given.default is None:
            return
        value, low, high = given.default, given.keywords.get("minimum"), given.keywords.get("maximum")
        kinds: dict[str, Any] = {
            "boolean": bool,
            "integer": int,
            "number": (int, float),
            "string": str,
            "array": list,
            "object": dict,
        }
        kind = kinds[given.schema["type"]]
        if not isinstance(value, kind) or (isinstance(value, bool) and given.schema["type"] != "boolean"):
            self.refuse(node, f"input {given.name}: its default {value!r} is not of its type")
        if given.choices and value not in given.choices:
            self.refuse(node, f"input {given.name}: its default {value!r} is none of its choices")
        if isinstance(value, int | float) and (
            (low is not None and value < low) or (high is not None and value > high)
        ):
            self.refuse(node, f"input {given.name}: its default {value!r} is outside its own ge and le")

    def choices(self, node: ast.expr, name: str) -> tuple[Any, ...]:
        """A list, a name for one in this file, list(D.keys()), list(D.values()), or a sum of these."""
        what = f"input {name}: choices"
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self.choices(node.left, name) + self.choices(node.right, name)
        value: Any
        match node:
            case ast.Call(
                func=ast.Name(id="list"),
                args=[ast.Call(func=ast.Attribute(value=ast.Name(id=table), attr="keys" | "values" as part), args=[])],
            ) if table in self.scope:
                mapping = self.literal(self.scope[table], what)
                if not isinstance(mapping, dict):
                    self.refuse(node, f"{what}: {table} is no dictionary of literals")
                value = list(mapping.keys() if part == "keys" else mapping.values())
            case ast.List() | ast.Name():
                value = self.literal(node, what)
            case _:
                value = None
        if not isinstance(value, list) or not value:
            self.refuse(node, f"{what} must be a list of literals, in place or under a name of this file")
        return tuple(value)

    def literal(self, node: ast.expr, what: str, *, names: bool = True) -> Any:
        """The value of a literal, or with `names` of a name given one at the top of this file."""
        if names and isinstance(node, ast.Name) and node.id in self.scope:
            return self.literal(self.scope[node.id], what, names=False)
        match node:
            case ast.Constant(value=None | bool()):
                return node.value
            case ast.Constant(value=str()):
                # Cog takes the text between the quotes as it stands: no escapes, no joining of parts.
                text = ast.get_source_segment(self.source, node) or ""
                quotes = 3 if text.startswith(('"""', "'''")) else 1
                if text.removeprefix("r")[quotes : len(text) - quotes - text.startswith("r")] != node.value:
                    self.refuse(node, f"{what} must be one plain string, without escapes and not in parts")
                return node.value
            case ast.Constant(value=int() | float()) | ast.UnaryOp(operand=ast.Constant(value=int() | float())):
                text = ast.get_source_segment(self.source, node) or ""
                if not _NUMBER.fullmatch(text):
                    self.refuse(node, f"{what}: {text} must be a plain decimal number")
                number = ast.literal_eval(text.removeprefix("+"))
                if isinstance(number, int) and not -(2**63) <= number < 2**63:
                    self.refuse(node, f"{what}: {text} does not fit in 64 bits")
                return number
            case ast.List() | ast.Tuple() | ast.Set():
                return [self.literal(item, what, names=False) for item in node.elts]
            case ast.Dict() if None not in node.keys:
                keys = [self.literal(key, what, names=False) for key in node.keys if key is not None]
                return dict(zip(keys, (self.literal(v, what, names=False) for v in node.values), strict=True))
        self.refuse(node, f"{what} must be a literal: Cog can't read {ast.unparse(node)!r}")

    def input_type(self, node: ast.expr) -> tuple[dict[str, Any], bool]:
        """JSON Schema, and whether it may be left empty."""
        node = self.unquoted(node)
        name, arguments = self.generic(node)
        if isinstance(node, ast.BinOp):
            arguments = self.union(node)
        if isinstance(node, ast.BinOp) or name == "Union":
            some = [a for a in arguments if not (isinstance(a, ast.Constant) and a.value is None)]
            if len(some) != 1:
                self.refuse(node, f"{ast.unparse(node)}: of unions, only `X | None` is read here")
            schema, nullable = self.input_type(some[0])
            return schema, nullable or len(some) < len(arguments)
        if name == "Optional" and len(arguments) == 1:
            return self.input_type(arguments[0])[0], True
        if name in ("list", "List") and len(arguments) == 1:
            schema, nullable = self.input_type(arguments[0])
            if nullable or schema.get("type") == "array":
                self.refuse(node, f"{ast.unparse(node)}: a list holds plain values only")
            return {"type": "array", "items": schema}, False
        if name in PRIMITIVES and (not arguments or name in ("dict", "Dict")):
            return dict(PRIMITIVES[name]), False
        self.refuse(node, f"{ast.unparse(node)} is not a type that Cog takes as input")

    def output(self, method: ast.FunctionDef | ast.AsyncFunctionDef, *, streaming: bool) -> dict[str, Any]:
        if method.returns is None:
            self.refuse(method, f"{method.name} has no return type")
        node = self.unquoted(method.returns)
        name, arguments = self.generic(node)
        iterators = ("Iterator", "AsyncIterator", "ConcatenateIterator", "AsyncConcatenateIterator")
        if name not in iterators:
            if streaming:
                self.refuse(node, f"@cog.streaming needs one of {', '.join(iterators)} as return type")
            return self.output_type(node)
        if len(arguments) != 1:
            self.refuse(node, f"{name} takes one type")
        schema = {"type": "array", "items": self.output_type(arguments[0]), "x-cog-array-type": "iterator"}
        if "Concatenate" in name:
            if schema["items"] != PRIMITIVES["str"]:
                self.refuse(node, f"{name} holds str only")
            schema["x-cog-array-display"] = "concatenate"
        return schema

    def output_type(self, node: ast.expr) -> dict[str, Any]:
        node = self.unquoted(node)
        name, arguments = self.generic(node)
        if name in ("list", "List") and len(arguments) == 1:
            return {"type": "array", "items": self.output_type(arguments[0])}
        if name in ("dict", "Dict") and len(arguments) == 2:
            return {"type": "object", "additionalProperties": self.output_type(arguments[1])}
        if name in PRIMITIVES and not arguments:
            return dict(PRIMITIVES[name])
        self.refuse(node, f"{ast.unparse(node)} is not an output type that is read here")

    def generic(self, node: ast.expr) -> tuple[str, list[ast.expr]]:
        """`typing.Optional[X]` as "Optional", [X]; a plain name has no arguments."""
        arguments: list[ast.expr] = []
        if isinstance(node, ast.Subscript):
            arguments = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            node = node.value
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            return node.attr, arguments
        return (node.id if isinstance(node, ast.Name) else ""), arguments

    def union(self, node: ast.expr) -> list[ast.expr]:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            return self.union(node.left) + self.union(node.right)
        return [node]

    def unquoted(self, node: ast.expr) -> ast.expr:
        if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
            return node
        try:
            inner = ast.parse(node.value, mode="eval").body
        except SyntaxError:
            self.refuse(node, f"{node.value!r} is not a type")
        return ast.copy_location(inner, node)

    def refuse(self, node: ast.AST, why: str) -> NoReturn:
        raise PredictorError(f"{self.file}:{getattr(node, 'lineno', '?')}: {why}")
