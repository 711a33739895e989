#!/usr/bin/env python3
"""Compiles src/*.cu to ptx/*.ptx with NVRTC and checks them with ptxas; needs no GPU and no CUDA installation.

    build.py           compile, write ptx/, MANIFEST and RESOURCES.md
    build.py --check   compile again and fail on any difference; --if-possible: skip, saying so, where the compiler cannot be had

The compiler is the pinned wheels below, in a venv made in the first run (--venv DIR, default target/cuda-venv; it needs a package
index). A kernel that spills registers on any target fails.
"""

import argparse
import concurrent.futures
import ctypes
import hashlib
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import venv

HERE = pathlib.Path(__file__).resolve().parent
# The oldest NVRTC of CUDA 12 in wheels writes PTX 8.1, which drivers from 530 on accept; the newest ptxas knows all targets.
WHEELS = ["nvidia-cuda-nvrtc-cu12==12.1.105", "nvidia-cuda-nvcc-cu12==12.9.86"]
OPTIONS = ["--std=c++17", "--fmad=false", "--gpu-architecture=compute_{arch}"]
TARGETS = [75, 80, 86, 89, 90, 100, 120]

QUANTISED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K", "IQ4_NL", "IQ4_XS", "MXFP4"]
FLOATS = ["F32", "F16", "BF16"]
CACHES = FLOATS + ["Q8_0", "Q4_0"]
# Types of a layer's two caches that differ.
PAIRS = [(a, b) for a in ["F16", "Q8_0", "Q4_0"] for b in ["F16", "Q8_0", "Q4_0"] if a != b]
# Kernels for targets that give a block much shared memory, and for those that do not.
ONLY = {"mla_f16": [80, 90, 100], "mla_small_f16": [86, 89, 120]}
# (name of the PTX file, source, format, architecture). One text serves every target from its architecture on, up to that of the module's next.
MODULES = (
    [(f"matvec_{f.lower()}", "matvec.cu", f, 75) for f in QUANTISED]
    + [(f"matvec_{f.lower()}", "float.cu", f, 75) for f in FLOATS]
    + [(f"skinny_{f.lower()}", "skinny.cu", f, 75) for f in QUANTISED]
    + [(f"skinny_{f.lower()}_sm80", "skinny.cu", f, 80) for f in QUANTISED]
    + [(f"matmul_{f.lower()}", "matmul.cu", f, 75) for f in QUANTISED]
    + [(f"matmul_{f.lower()}_sm80", "matmul.cu", f, 80) for f in QUANTISED]
    + [(f"matmul_half_{f.lower()}_sm80", "matmul_half.cu", f, 80) for f in QUANTISED + ["F16", "BF16"]]
    + [(f"matmul_{f.lower()}", "matmul_float.cu", f, 75) for f in FLOATS]
    + [(f"{s}_{f.lower()}", f"{s}.cu", f, 75) for s in ["attention", "prompt", "mass", "store"] for f in CACHES]
    + [(f"{s}_{a.lower()}_{b.lower()}", f"{s}.cu", f"{a},SECOND={b}", 75) for s in ["attention", "prompt", "mass"] for a, b in PAIRS]
    + [("mla_f16_sm80", "mla.cu", "F16", 80), ("mla_small_f16_sm80", "mla.cu", "F16,SMALL", 80)]
    + [(name, f"{name}.cu", None, 75) for name in ["cache", "round", "router", "rows"]]
    + [(f"{s}_sm80", f"{s}.cu", None, 80) for s in ["prompt_half", "attend_half"]]
)
# What decoding launches, in texts of kernels that begin while the one before ends (overlap.cuh).
OVERLAPS = {"matvec.cu": 75, "float.cu": 75, "attention.cu": 75, "store.cu": 75, "round.cu": 75, "router.cu": 75, "rows.cu": 75}
OVERLAPS |= {"skinny.cu": 80, "mla.cu": 80, "attend_half.cu": 80}
MODULES += [(f"{n.removesuffix('_sm80')}_sm90", source, fmt, 90) for n, source, fmt, arch in MODULES if OVERLAPS.get(source) == arch]


def install(folder):
    """Makes the venv and installs the pinned wheels, where that has not been done."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    have = subprocess.run([python, "-m", "pip", "freeze"], capture_output=True, text=True, check=True).stdout.split()
    if any(w not in have for w in WHEELS):
        subprocess.run([python, "-m", "pip", "install", "--quiet", *WHEELS], check=True)


def tools(folder):
    """The venv's NVRTC (a loaded library) and the path of its ptxas."""
    nvidia = next(folder.glob("lib/python3*/site-packages/nvidia"))
    lib = nvidia / "cuda_nvrtc" / "lib"
    ctypes.CDLL(str(next(lib.glob("libnvrtc-builtins.so.*"))))
    return ctypes.CDLL(str(lib / "libnvrtc.so.12")), nvidia / "cuda_nvcc" / "bin" / "ptxas"


def compile_ptx(folder, source, fmt, arch):
    """The PTX of one source. Once in a process: what NVRTC compiled before shows in some texts."""
    nvrtc, _ = tools(folder)
    options = [o.format(arch=arch) for o in OPTIONS] + [f"--include-path={HERE / 'src'}"]
    if fmt:
        options += [f"-D{d}" for d in f"FORMAT={fmt}".split(",")]
    program = ctypes.c_void_p()
    text = (HERE / "src" / source).read_bytes()
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, source.encode(), 0, None, None):
        sys.exit(f"NVRTC takes no program from {source}")
    args = (ctypes.c_char_p * len(options))(*[o.encode() for o in options])
    failed = nvrtc.nvrtcCompileProgram(program, len(options), args)
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    if log.value.strip():
        print(log.value.decode(), file=sys.stderr)
    if failed:
        sys.exit(f"{source} ({fmt}) does not compile")
    nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size))
    ptx = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetPTX(program, ptx)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    # NVRTC's own constants (nv::target), which nothing reads.
    return "".join(line for line in ptx.value.decode().splitlines(True) if "nv6target" not in line)


def resources(ptxas, path, arch):
    """Kernel -> (registers, shared bytes, spilled bytes), as ptxas assembles it for sm_<arch>."""
    with tempfile.NamedTemporaryFile() as out:
        cmd = [ptxas, "-v", f"--gpu-name=sm_{arch}", path, "-o", out.name]
        run = subprocess.run(cmd, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"ptxas refuses {path.name} for sm_{arch}:\n{run.stderr}")
    found = {}
    for part in run.stderr.split("Compiling entry function '")[1:]:
        spill = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", part))
        stack = int(re.search(r"(\d+) bytes stack frame", part)[1])
        smem = re.search(r"(\d+) bytes smem", part)
        found[part.split("'")[0]] = (int(re.search(r"Used (\d+) registers", part)[1]), int(smem[1]) if smem else 0, spill + stack)
    return found


def sha(path):
    """SHA-256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def build(folder, out):
    """Everything that is committed, made anew below `out`."""
    _, ptxas = tools(folder)
    (out / "ptx").mkdir(exist_ok=True)
    table, spills = [], []

    def module(name, arch):
        """Its text, and what ptxas says of it for each target."""
        made = subprocess.run([sys.executable, __file__, "--venv", folder, "--compile", name], capture_output=True, text=True)
        print(made.stderr, end="", file=sys.stderr)
        if made.returncode:
            sys.exit(f"{name} does not compile")
        path = out / "ptx" / f"{name}.ptx"
        path.write_text(made.stdout)
        base = name.removesuffix(f"_sm{arch}")
        newer = [a for n, _, _, a in MODULES if a > arch and n == f"{base}_sm{a}"]
        return {a: resources(ptxas, path, a) for a in ONLY.get(base, TARGETS) if arch <= a < min(newer, default=1000)}

    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    jobs = {name: pool.submit(module, name, arch) for name, _, _, arch in MODULES}
    for name, _, _, _ in MODULES:
        per = jobs[name].result()
        # In the order of the text: ptxas reports them in any.
        for kernel in re.findall(r"\.entry (\w+)", (out / "ptx" / f"{name}.ptx").read_text()):
            cells = [f"{per[a][kernel][0]}" if a in per else "-" for a in TARGETS]
            spilt = max(per[a][kernel][2] for a in per)
            shared = max(per[a][kernel][1] for a in per)
            table.append(f"| {name} | {kernel} | {' | '.join(cells)} | {shared} | {spilt} |")
            if spilt:
                spills.append(f"{name}: {kernel} spills {spilt} bytes")
    lines = ["# Made by build.py: what the PTX was made of, and what came out. Checked by ref-tests/tests/cuda_manifest.rs."]
    lines += [f"compiler {WHEELS[0]}", f"assembler {WHEELS[1]}", f"options {' '.join(OPTIONS)}"]
    lines += [f"source {sha(p)} {p.name}" for p in sorted((HERE / "src").iterdir())]
    for name, source, fmt, arch in MODULES:
        define = f"-DFORMAT={fmt}" if fmt else "-"
        lines.append(f"ptx {sha(out / 'ptx' / (name + '.ptx'))} {name}.ptx {source} {define} compute_{arch}")
    (out / "MANIFEST").write_text("\n".join(lines) + "\n")
    head = "# Registers, shared memory and spills\n\nMade by `build.py` with ptxas "
    head += f"({WHEELS[1].split('==')[1]}): registers per thread on each target, the largest shared memory and the largest "
    head += "sum of stack and spilled bytes over all targets.\n\n"
    columns = " | ".join(f"sm_{a}" for a in TARGETS)
    head += f"| module | kernel | {columns} | shared | spilled |\n|---|---|{'---:|' * (len(TARGETS) + 2)}\n"
    (out / "RESOURCES.md").write_text(head + "\n".join(table) + "\n")
    if spills:
        sys.exit("\n".join(spills))


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with what is committed, change nothing")
    parser.add_argument("--venv", type=pathlib.Path, default=HERE.parents[2] / "target" / "cuda-venv")
    parser.add_argument("--if-possible", action="store_true", help="without the compiler: say so and succeed")
    parser.add_argument("--compile", metavar="MODULE", help="write the PTX of one module to the standard output")
    args = parser.parse_args()
    if args.compile:
        return sys.stdout.write(next(compile_ptx(args.venv, *m[1:]) for m in MODULES if m[0] == args.compile))
    try:
        install(args.venv)
    except (OSError, subprocess.CalledProcessError) as error:
        if args.if_possible:
            return print(f"skipped: the pinned CUDA compiler cannot be installed here ({error})")
        raise
    if not args.check:
        for old in (HERE / "ptx").glob("*.ptx"):
            old.unlink()
        return build(args.venv, HERE)
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder)
        build(args.venv, out)
        made = sorted(p.relative_to(out) for p in out.rglob("*") if p.is_file())
        there = [HERE / "MANIFEST", HERE / "RESOURCES.md", *(HERE / "ptx").iterdir()]
        here = sorted(p.relative_to(HERE) for p in there)
        differ = [str(p) for p in made if p not in here or (out / p).read_bytes() != (HERE / p).read_bytes()]
        differ += [str(p) for p in here if p not in made]
        if differ:
            sys.exit("not what the sources compile to: " + ", ".join(differ))
        print(f"{len(made)} files are what the sources compile to")


if __name__ == "__main__":
    main()
