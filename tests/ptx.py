"""Run compiled kernels without a GPU, thread by thread.

What a kernel says in words of its own, inside `plgpu.inline_mgpu`, Pallas' interpreter
cannot run. Here is a machine for the assembly that it is compiled to: plain arithmetic,
global and shared memory, barriers, exchanges within a warp, and the matrix instructions
of a warp. No memory engine and nothing that a warpgroup multiplies. Memory is checked:
every access is aligned and inside its array, reads may go on to the end of the last 16
bytes.
"""

import functools
import itertools
import math
import re
import struct

import jax.numpy as jnp
import numpy as np

WARP = 32
_MASK = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFFFFFF, 8: 0xFFFFFFFFFFFFFFFF}
_POISON = 0xFF  # bytes that nobody has written: NaNs


def run(ptx, arrays, shape, dtype, grid, threads, result=None, early=False):
    """Run a kernel with one result.

    Args:
      ptx: its assembly.
      arrays: NumPy arrays of its operands, in the order in which it uses them first.
      shape: shape of its result.
      dtype: dtype of its result.
      grid: number of thread blocks along x, y and z.
      threads: threads of a block.
      result: place of the result among the operands. Default: behind all arrays.
      early: do asynchronous copies at once; else, as late as they are waited for.

    Returns:
      NumPy array of the result; NaN where nothing was stored.
    """
    memory = _Memory()
    places = [memory.add(np.ascontiguousarray(a).tobytes(), False) for a in arrays]
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    result = len(places) if result is None else result
    places.insert(result, memory.add(bytes([_POISON] * size), True))
    code = _translate(ptx)
    for block in itertools.product(*map(range, reversed(grid))):
        _run_block(code, memory, places, block[::-1], threads, early)
    data, *_ = memory.spaces[places[result] >> 32]
    return np.frombuffer(bytes(data[:size]), jnp.dtype(dtype)).reshape(shape)


class _Memory:
    """Arrays of global memory, each 4 GiB behind the other, and shared memory."""

    def __init__(self):
        self.spaces = {}

    def add(self, data, writable):
        place = len(self.spaces) + 1
        filled = bytearray(data) + bytearray([_POISON] * (-len(data) % 16))
        self.spaces[place] = (filled, len(data), writable)
        return place << 32

    def clear_shared(self):
        self.spaces[0] = (bytearray([_POISON] * 232448), 232448, True)

    def load(self, address, size):
        data, _, _ = self.spaces[address >> 32]
        at = address & 0xFFFFFFFF
        assert at % size == 0 and at + size <= len(data), f"bad read at {address:#x}"
        return int.from_bytes(data[at : at + size], "little")

    def store(self, address, size, value):
        data, length, writable = self.spaces[address >> 32]
        at = address & 0xFFFFFFFF
        inside = writable and at % size == 0 and at + size <= length
        assert inside, f"bad write at {address:#x}"
        data[at : at + size] = value.to_bytes(size, "little")


def _run_block(code, memory, places, block, threads, early):
    memory.clear_shared()
    barriers, waiting = {}, {}
    load, store = memory.load, memory.store
    running = {
        i: code(i, block, places, load, store, barriers, _Copies(load, store, early))
        for i in range(threads)
    }
    ready = {i: None for i in running}
    while ready or waiting:
        assert ready, f"all threads wait: {set(map(str, waiting.values()))}"
        for i, answer in list(ready.items()):
            del ready[i]
            try:
                waiting[i] = running[i].send(answer)
            except StopIteration:
                continue
        _answer(waiting, ready, threads)


def _answer(waiting, ready, threads):
    """Let those threads go on that have what they wait for."""
    for i, (kind, *_) in list(waiting.items()):
        if kind == "spin":
            del waiting[i]
            ready[i] = None
    groups = {}
    for i, request in waiting.items():
        kind, key, *_ = request
        group = (kind, key, i // WARP if kind == "warp" else None)
        groups.setdefault(group, []).append(i)
    for (kind, key, _), members in groups.items():
        if kind == "bar":
            count = key[1] or threads
            if len(members) == count:
                for i in members:
                    del waiting[i]
                    ready[i] = None
        elif kind == "warp" and len(members) == WARP:
            requests = {i % WARP: waiting[i][2:] for i in members}
            for i in members:
                ready[i] = _exchange(requests, i % WARP)
                del waiting[i]


def _exchange(requests, lane):
    name, *_ = requests[lane]
    if name == "bfly":
        return requests[lane ^ requests[lane][2]][1]
    if name == "idx":
        return requests[requests[lane][2]][1]
    if name == "all":
        return [requests[i][1] for i in range(WARP)]
    if name == "multiply":
        if "product" not in requests:
            requests["product"] = _multiply_sparse(requests)
        return requests["product"][lane]
    if name == "any":
        return any(request[1] for request in requests.values())
    if name == "ballot":
        return sum(1 << i for i, request in requests.items() if request[1])
    assert name == "elect", name
    return lane == 0


def _multiply_sparse(requests):
    """Multiply a 2:4 matrix of 16 rows with 8 columns, given and taken by the lanes.

    The manual calls it mma.sp.m16n8k32, or m16n8k64 where values have 8 bits.
    """
    lanes = np.arange(WARP)
    _, _, _, _, _, kind, selector = requests[0]
    a, b, sums, words = (
        np.array([requests[lane][i] for lane in lanes], np.uint32) for i in range(1, 5)
    )
    values = {"bf16": jnp.bfloat16, "f16": np.float16, "s8": np.int8}[kind]
    size = np.dtype(values).itemsize
    per, depth = 4 // size, 64 // size  # values of a register; inputs
    a, b = (x.view(values).astype(np.float64).reshape(WARP, 4, per) for x in (a, b))
    sums = sums.view(np.int32 if kind == "s8" else np.float32)
    quad, of_quad = lanes // 4, lanes % 4
    kept, inputs = np.zeros((16, depth // 2)), np.zeros((depth, 8))
    codes = np.zeros((16, depth // 4), np.uint32)
    out = [(quad + 8 * (i // 2), 2 * of_quad + i % 2) for i in range(4)]
    for i in range(4):
        for e in range(per):
            column = per * of_quad + e
            kept[quad + 8 * (i % 2), column + 4 * per * (i // 2)] = a[:, i, e]
            inputs[column + 4 * per * i, quad] = b[:, i, e]
    for i in range(8):
        code = words >> 4 * i & 15
        if size == 1:
            codes[quad + 8 * (of_quad % 2), 8 * (of_quad // 2) + i] = code
        else:
            some = of_quad // 2 == selector
            place = quad + 8 * (i // 4), 4 * (of_quad % 2) + i % 4
            codes[place[0][some], place[1][some]] = code[some]
    dense = np.zeros((16, depth))
    for i in range(2):
        assert i == 0 or (codes & 3 < codes >> 2).all(), "positions must ascend"
        place = 4 * np.arange(depth // 4) + (codes >> 2 * i & 3)
        np.put_along_axis(dense, place.astype(int), kept[:, i::2], axis=1)
    product = dense @ inputs
    found = [sums[:, i] + product[place] for i, place in enumerate(out)]
    found = np.stack(found, axis=1).astype(sums.dtype)
    return found.view(np.uint32).tolist()


# Numbers are kept as their bits.


def _f(bits):
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def _b(value):
    with np.errstate(over="ignore"):
        return int(np.float32(value).view(np.uint32))


def _s(bits, size):
    sign = 1 << (8 * size - 1)
    return (bits & _MASK[size] ^ sign) - sign


def _half(value, dtype):
    with np.errstate(over="ignore"):
        return int(np.float32(value).astype(dtype).view(np.uint16))


def _from_half(bits, dtype):
    return float(np.uint16(bits).view(dtype))


def _from_pair(bits, dtype):
    """Convert two float8 to two float16."""
    pair = np.array([bits & 0xFF, bits >> 8], np.uint8).view(dtype)
    return int(pair.astype(np.float16).view(np.uint32)[0])


def _permute(a, b, order):
    data = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    picked = [data[order >> 4 * i & 7] for i in range(4)]
    signs = [order >> 4 * i & 8 for i in range(4)]
    return int.from_bytes(
        bytes(
            (255 if p & 128 else 0) if s else p
            for p, s in zip(picked, signs, strict=True)
        ),
        "little",
    )


def _divide(a, b):
    with np.errstate(all="ignore"):
        return float(np.float32(a) / np.float32(b))


def _power(a):
    return math.inf if a > 128 else 2.0**a


class _Copies:
    """Asynchronous copies of one thread, in groups."""

    def __init__(self, load, store, early):
        self.load, self.store, self.early = load, store, early
        self.groups = [[]]

    def start(self, target, source, size):
        self.groups[-1].append((target, source, size))
        if self.early:
            self.finish(self.groups)

    def commit(self):
        self.groups.append([])

    def wait(self, count):
        self.finish(self.groups[: len(self.groups) - 1 - count])

    def finish(self, groups):
        for group in groups:
            for target, source, size in group:
                self.store(target, size, self.load(source, size))
            group.clear()


class _Barrier:
    def __init__(self, count):
        self.count = self.left = count
        self.phase = 0

    def arrive(self, count):
        self.left -= count
        assert self.left >= 0
        if not self.left:
            self.left, self.phase = self.count, self.phase + 1

    def passed(self, parity):
        return self.phase % 2 != parity


_NAMES = {
    "f": _f, "b": _b, "s": _s, "half": _half, "from_half": _from_half, "np": np,
    "from_pair": _from_pair, "permute": _permute, "divide": _divide, "power": _power,
    "Barrier": _Barrier, "bf16": jnp.bfloat16, "f16": np.float16,
    "e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2, "isnan": math.isnan,
    "nan": math.nan,
}  # fmt: skip
_SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}
_COMPARE = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
    "lo": "<", "ls": "<=", "hi": ">", "hs": ">=",
}  # fmt: skip


@functools.cache
def _translate(ptx):
    """Translate assembly to a generator of Python: one block of lines a label."""
    parameters = re.findall(r"\.param \.\w+.*? (\w+_param_\d+)", ptx)
    start = ptx.index("\n{\n") + 2
    body = ptx[start : ptx.index("\n}\n", start)]
    body = re.sub(r"//.*", "", body)
    body = re.sub(r"(?m)^\s*\.(loc|file|reg|shared|pragma|section).*$", "", body)
    body = re.sub(r"\.(reg|shared)\s[^;]*;", "", body)
    blocks = [["start", []]]
    for statement in _split(body):
        if statement.endswith(":"):
            blocks.append([statement[:-1], []])
        else:
            blocks[-1][1].append(statement)
    labels = {label: i for i, (label, _) in enumerate(blocks)}
    lines = [
        "def code(tid, block, places, load, store, barriers, copies):",
        "  at = 0",
        "  while True:",
    ]
    for i, (_, content) in enumerate(blocks):
        lines.append(f"   if at == {i}:")
        lines.append(f"    at = {i + 1}")
        for number, statement in enumerate(content):
            lines += _statement(statement, labels, parameters, f"{i}.{number}")
    lines.append("  yield")
    # Registers may be read before anything is in them, where it does not matter.
    used = sorted(set(re.findall(r"\bv_\w+", "\n".join(lines))))
    lines.insert(1, "  " + " = ".join([*used, "0"]))
    scope = dict(_NAMES)
    exec("\n".join(lines), scope)
    return scope["code"]


def _split(body):
    """Split into labels and statements; give every inner scope names of its own."""
    found, scopes, count = [], [], itertools.count()
    rest = body
    while rest := rest.lstrip():
        if rest[0] == "{":
            scopes.append(f"_scope{next(count)}")
            rest = rest[1:]
        elif rest[0] == "}":
            scopes.pop()
            rest = rest[1:]
        elif label := re.match(r"([$\w]+)\s*:", rest):
            found.append(_rename(label[1], scopes) + ":")
            rest = rest[label.end() :]
        else:
            statement, rest = rest.split(";", 1)
            found.append(_rename(" ".join(statement.split()), scopes))
    assert not scopes
    return found


def _rename(statement, scopes):
    """Rename what is declared in an inner scope: names without % or $."""
    if not scopes:
        return statement
    head = re.match(r"(@!?\S+ )?(\S+)", statement)
    if head and "." not in head[0] and head.end() == len(statement):
        return statement + scopes[-1]  # a label
    opcode_end = head.end()
    parts = head[1] or ""
    rename = lambda text: re.sub(  # noqa: E731
        r"(?<![%$\w.])([A-Za-z_]\w*)(?![\w.])", lambda m: m[1] + scopes[-1], text
    )
    return rename(parts) + head[2] + rename(statement[opcode_end:])


def _operand(text, parameters):
    text = text.strip()
    if text.startswith("%tid."):
        return "tid" if text.endswith("x") else "0"
    if text.startswith("%ctaid."):
        return f"block[{'xyz'.index(text[-1])}]"
    if text.startswith("0f"):
        return str(int(text[2:], 16))
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
        return f"({text.rstrip('U')})"
    if text.startswith("__dynamic_shmem"):
        return "0"
    if text in parameters:
        return f"places[{parameters.index(text)}]"
    return "v_" + re.sub(r"\W", "_", text)


def _address(text, parameters):
    base, _, offset = text.strip()[1:-1].partition("+")
    return f"({_operand(base, parameters)} + {offset or 0})"


def _statement(statement, labels, parameters, place):
    """Translate one statement to lines of Python."""
    guard = ""
    if statement.startswith("@"):
        predicate, statement = statement.split(" ", 1)
        negated = "not " if predicate[1] == "!" else ""
        guard = f"if {negated}{_operand(predicate.lstrip('@!'), parameters)}: "
    name, _, rest = statement.partition(" ")
    rest = rest.strip()
    arguments = [
        a.strip()
        for a in re.findall(r"\s*(?:\{[^}]*\}|\[[^\]]*\]|[^,]+)", rest)
        if a.strip()
    ]
    values = [
        a if a[0] in "{[" else _operand(a, parameters)
        for a in arguments
        if "|" not in a
    ]
    lines = _lines(name, arguments, values, labels, parameters, place)
    if guard:
        return [f"    {guard}", *(f"      {line}" for line in lines)]
    return [f"    {line}" for line in lines]


def _lines(name, arguments, values, labels, parameters, place):
    parts = name.split(".")
    kind = parts[-1]
    size = _SIZES.get(kind[1:], 4)
    mask = _MASK[size]
    head = parts[0]
    if head == "ret":
        return ["return"]
    if head == "bra":
        return [f"at = {labels[arguments[0]]}", "continue"]
    if head in ("fence", "membar", "griddepcontrol"):
        return ["pass"]
    if head in ("bar", "barrier"):
        count = values[1] if len(values) > 1 else "0"
        return [f"yield ('bar', ({values[0]}, {count}))"]
    if head == "mbarrier":
        where = next(a for a in arguments if a[0] == "[")
        barrier = f"barriers[{_address(where, parameters)}]"
        if parts[1] == "init":
            return [f"{barrier} = Barrier({values[1]})"]
        if parts[1] == "arrive":
            return [f"{barrier}.arrive({values[2] if len(values) > 2 else 1})"]
        assert parts[1:3] == ["try_wait", "parity"], name
        return [
            f"{values[0]} = {barrier}.passed({values[2]})",
            f"if not {values[0]}: yield ('spin', None)",
        ]
    request = f"yield ('warp', '{place}'"
    if head == "shfl":
        return [f"{values[0]} = {request}, '{parts[2]}', {values[1]}, {values[2]})"]
    if head == "vote":
        return [f"{values[0]} = {request}, '{parts[2]}', {values[1]})"]
    if head == "elect":
        target = arguments[0].split("|")[1]
        return [f"{_operand(target, parameters)} = yield ('warp', '{place}', 'elect')"]
    if name.startswith("cp.async."):
        if parts[2] == "commit_group":
            return ["copies.commit()"]
        if parts[2] == "wait_group":
            return [f"copies.wait({values[0]})"]
        target, source, count = (
            _address(a, parameters) if a[0] == "[" else a for a in values
        )
        return [f"copies.start({target} & 0xFFFFFFFF, {source}, {count})"]
    if head == "ldmatrix":
        assert parts[3] == "m8n8" and kind == "b16" and "trans" not in parts, name
        targets = [_operand(t, parameters) for t in arguments[0].strip("{}").split(",")]
        address = _address(values[1], parameters)
        return [f"rows = {request}, 'all', {address} & 0xFFFFFFFF)"] + [
            f"{t} = load(rows[{8 * i} + tid % 32 // 4] + 4 * (tid % 4), 4)"
            for i, t in enumerate(targets)
        ]
    if head == "mma":
        assert parts[1] == "sp::ordered_metadata" and parts[5:7] == ["row", "col"]
        *groups, word, selector = values
        target, *operands = (
            [_operand(v, parameters) for v in group.strip("{}").split(",")]
            for group in groups
        )
        given = ", ".join(f"({', '.join(operand)})" for operand in operands)
        return [
            f"{', '.join(target)} = {request}, 'multiply', {given}, {word}, "
            f"{parts[8]!r}, {selector})"
        ]
    if head == "ld":
        targets = arguments[0].strip("{}").split(",")
        targets = [_operand(t, parameters) for t in targets]
        if parts[1].startswith("param"):
            return [f"{targets[0]} = {_address(values[1], parameters)}"]
        at = f"a = {_address(values[1], parameters)}"
        if "shared" in parts[1]:
            at += " & 0xFFFFFFFF"
        return [at, f"assert a % {size * len(targets)} == 0, a"] + [
            f"{t} = load(a + {i * size}, {size})" for i, t in enumerate(targets)
        ]
    if head == "st":
        sources = (
            values[1].strip("{}").split(",") if values[1][0] == "{" else [arguments[1]]
        )
        sources = [_operand(t, parameters) for t in sources]
        at = f"a = {_address(values[0], parameters)}"
        if "shared" in parts[1]:
            at += " & 0xFFFFFFFF"
        return [at, f"assert a % {size * len(sources)} == 0, a"] + [
            f"store(a + {i * size}, {size}, {t} & {mask})"
            for i, t in enumerate(sources)
        ]
    if head == "mov" and any(a[0] == "{" for a in arguments):
        return _pack(*arguments, size, parameters)
    target, *given = values
    a, b, c, *_ = [*given, "", "", ""]
    signed = (
        (lambda v: f"s({v}, {size})")
        if kind[0] == "s"
        else (lambda v: f"(({v}) & {mask})")
    )
    if head == "setp":
        a, b = (f"f({v})" if kind == "f32" else signed(v) for v in (a, b))
        result = f"({a} {_COMPARE[parts[1]]} {b})"
        if len(parts) == 4:
            result = f"{result} {parts[2]} {c}"
        return [f"{target} = {result}"]
    if head == "cvt":
        return [f"{target} = {_convert(parts[1:], a)}"]
    if kind == "f32" and head in (
        "fma",
        "add",
        "sub",
        "mul",
        "div",
        "max",
        "ex2",
        "neg",
        "abs",
    ):
        x, y, z = (f"f({v})" for v in (a, b, c))
        result = {
            "fma": f"{x} * {y} + {z}", "add": f"{x} + {y}", "sub": f"{x} - {y}",
            "mul": f"{x} * {y}", "div": f"divide({x}, {y})", "ex2": f"power({x})",
            "max": f"(nan if isnan({x}) or isnan({y}) else max({x}, {y}))",
            "neg": f"-{x}", "abs": f"abs({x})",
        }[head]  # fmt: skip
        return [f"{target} = b({result})"]
    if kind == "pred":
        result = {
            "mov": f"bool({a})", "not": f"not {a}", "and": f"{a} and {b}",
            "or": f"{a} or {b}", "xor": f"{a} != {b}",
        }[head]  # fmt: skip
        return [f"{target} = {result}"]
    wide = mask
    if head in ("mul", "mad") and parts[1] == "wide":
        wide = _MASK[2 * size]
    x, y, z = (
        signed(a),
        signed(b) if b else "",
        signed(c) if c and head != "selp" else c,
    )
    if head in ("mul", "mad") and parts[1] == "hi":
        return [f"{target} = ({x} * {y} >> {8 * size}) & {mask}"]
    result = {
        "mov": a, "cvta": a, "add": f"{a} + {b}", "sub": f"{a} - {b}",
        "mul": f"{x} * {y}", "mad": f"{x} * {y} + ({c})",
        "and": f"{a} & {b}", "or": f"{a} | {b}", "xor": f"{a} ^ {b}", "not": f"~{a}",
        "shl": f"({a} << {b}) if {b} < 64 else 0", "shr": f"{x} >> {b}",
        "min": f"min({x}, {y})", "max": f"max({x}, {y})", "neg": f"-{x}",
        "div": f"{x} // {y}" if kind[0] == "u" else None,
        "rem": f"{x} % {y}" if kind[0] == "u" else None,
        "bfe": f"({a}) >> {b} & (1 << {c}) - 1" if kind[0] == "u" else None,
        "selp": f"({a} if {c} else {b})", "prmt": f"permute({a}, {b}, {c})",
        "popc": f"({a}).bit_count()",
    }.get(head)  # fmt: skip
    assert result is not None, f"{name} {arguments}"
    return [f"{target} = ({result}) & {wide}"]


def _pack(target, source, size, parameters):
    """Translate a move between a register and its parts."""
    parts = next(a for a in (target, source) if a[0] == "{").strip("{}").split(",")
    names = ["_" if p.strip() == "_" else _operand(p, parameters) for p in parts]
    bits, mask = 8 * size // len(parts), _MASK[size // len(parts)]
    if target[0] == "{":
        whole = _operand(source, parameters)
        return [f"{n} = {whole} >> {i * bits} & {mask}" for i, n in enumerate(names)]
    terms = [f"({n} & {mask}) << {i * bits}" for i, n in enumerate(names)]
    return [f"{_operand(target, parameters)} = {' | '.join(terms)}"]


def _convert(parts, a):
    parts = [p for p in parts if p not in ("rn", "rz", "sat", "ftz", "satfinite")]
    to, source = parts
    if to == "f16x2":
        return f"from_pair({a}, {source[:-2]})"
    size = _SIZES.get(source[1:], 4)
    if source in ("f16", "bf16"):
        assert to == "f32"
        return f"b(from_half({a}, {source}))"
    if to in ("f16", "bf16"):
        assert source == "f32"
        return f"half(f({a}), {to})"
    number = f"s({a}, {size})" if source[0] == "s" else f"({a} & {_MASK[size]})"
    if to == "f32":
        return f"b({number})"
    # A signed number fills its register, which has 16 bits at least.
    number = f"s({number}, 1)" if to == "s8" else number
    return f"{number} & {_MASK[max(_SIZES[to[1:]], 2)]}"
