#!/usr/bin/env python3
"""Every test of the project: the notebooks, each in a process of its own, and what nbdev itself does not notice.

    python .ci/check.py               everything
    python .ci/check.py blae tokens   only the notebooks whose path contains one of these words

The last line is `N passed, N failed`; the exit code is 1 if anything failed.
"""
import ast, os, re, shutil, subprocess, sys, tempfile, time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import yaml
from fastcore.nbio import read_nb

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
BIN = Path(sys.executable).parent
ENV = {**os.environ, 'OMP_NUM_THREADS': '1', 'TQDM_DISABLE': '1', 'PATH': f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"}
MAX_NOTEBOOK = 500_000  # bytes
CELL_TIMEOUT = '600'    # seconds
DIRECTIVES = {'default_exp', 'export', 'exports', 'exporti', 'hide', 'slow', 'gpu', 'widget', 'echo'}  # add one here before using it


def notebooks():
    return sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)

def code_cells(path):
    return [c for c in read_nb(path).cells if c.cell_type == 'code']

def checkout(target):
    "Copy what git holds or would add, the working tree of a clean clone."
    names = run('git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard').stdout.split('\0')
    for name in filter(None, names):
        if (ROOT/name).exists():
            (target/name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT/name, target/name, follow_symlinks=False)

def run(*command, cwd=ROOT, env=ENV):
    return subprocess.run(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True)

def modules(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in (root/'meps_nb').rglob('*.py')}


# --- checks: each yields one line for every problem it finds ---

def clean_and_exported():
    "nbdev-clean and nbdev-export change nothing, and every module comes from a notebook"
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp)/'copy'
        checkout(copy)
        for name in modules(copy):
            if name != 'meps_nb/__init__.py': (copy/name).unlink()   # the version lives there
        for tool in ('nbdev-export', 'nbdev-clean'):
            done = run(tool, cwd=copy)
            if done.returncode: yield f'{tool} failed: {done.stdout}'
        before, after = modules(ROOT), modules(copy)
        for name in sorted(before.keys() | after.keys()):
            if name not in after: yield f'{name} is exported by no notebook'
            elif before.get(name) != after[name]: yield f'{name} differs from its notebook: run nbdev-export'
        for path in notebooks():
            if path.read_bytes() != (copy/path.relative_to(ROOT)).read_bytes(): yield f'{path.relative_to(ROOT)} is not clean: run nbdev-clean'

def unique_names():
    "No two notebooks export one module or share a file name"
    exports = Counter(c.directives['default_exp'] for p in notebooks() for c in code_cells(p) if 'default_exp' in c.directives)
    stems = Counter(p.stem for p in notebooks())
    for what, count in (*exports.items(), *stems.items()):
        if count > 1: yield f'{what} is defined by {count} notebooks'

def known_directives():
    "No directive that nbdev would ignore in silence, and none that skips a notebook's tests"
    for p in notebooks():
        for cell in read_nb(p).cells:
            where = f'{p.name}, cell {cell.id}'
            if cell.cell_type != 'code':
                if 'skip_exec' in cell.source: yield f'{where}: skip_exec would skip the whole notebook'
                continue
            for d in cell.directives:
                if d not in DIRECTIVES: yield f'{where}: unknown directive {d!r}'
            body = cell.source.splitlines()
            while body and (body[0].startswith('#') or not body[0].strip()): body.pop(0)
            if any(re.match(r'\s*#\s*\|', line) for line in body): yield f'{where}: a directive after the first line of code is ignored'

def plain_docstrings():
    "No TeX in a docstring, where a backslash is an escape"
    for name, code in modules(ROOT).items():
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)):  # control characters: what became of an escape like that of tau
                text = ast.get_docstring(node, clean=False) or ''
                if re.search(r'[$\\]|[\x00-\x09\x0b-\x1f]', text): yield f"{name}: TeX in the docstring of {getattr(node, 'name', 'the module')}"

def separate_imports():
    "In cells that are not exported, imports stand alone: the site's build executes every cell with an import"
    for p in notebooks():
        for cell in code_cells(p):
            if {'export', 'exports', 'exporti'} & cell.directives.keys(): continue
            tree = ast.parse(re.sub(r'^[%!].*', '', cell.source, flags=re.M))
            imports = (ast.Import, ast.ImportFrom)
            if any(isinstance(n, imports) for n in ast.walk(tree)) and not all(isinstance(n, imports) for n in tree.body):
                yield f'{p.name}, cell {cell.id}: imports mixed with other code'

def sound_outputs():
    "Stored outputs hold no error and no warning, pictures are PNG, and no notebook is too big"
    for p in notebooks():
        if p.stat().st_size > MAX_NOTEBOOK: yield f'{p.name}: {p.stat().st_size} bytes, more than {MAX_NOTEBOOK}'
        for cell in code_cells(p):
            for o in cell.outputs:
                if o['output_type'] == 'error' or o.get('name') == 'stderr': yield f'{p.name}, cell {cell.id}: stored output is an error or a warning'
                if 'image/svg+xml' in o.get('data', {}): yield f'{p.name}, cell {cell.id}: an SVG figure; store a PNG'

def in_the_sidebar():
    "The site's sidebar lists exactly the notebooks that there are"
    def entries(node): # every path in the nested lists
        if isinstance(node, str): yield node
        else: yield from (e for child in node for e in (entries(child['contents']) if isinstance(child, dict) else entries(child)))
    sidebar = yaml.safe_load((ROOT/'nbs'/'sidebar.yml').read_text(encoding='utf-8'))['website']['sidebar']
    listed, there = Counter(entries(sidebar['contents'])), Counter(p.relative_to(ROOT/'nbs').as_posix() for p in notebooks())
    for name in (listed - there) + (there - listed): yield f"{name} is {'missing from' if name in there else 'no notebook, but in'} nbs/sidebar.yml"

def book_rendered():
    "README.md and docs/ are what the notebooks' stored outputs say"
    from meps_nb.book import outdated
    for name in outdated(ROOT): yield f'{name} is out of date: run python -m meps_nb.book'

def wheel_works():
    "A wheel built from a clean checkout holds all it needs, and its command runs outside of the repository"
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        checkout(tmp/'source')
        pip = (sys.executable, '-m', 'pip', '--disable-pip-version-check')
        for step in ((*pip, 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', tmp/'wheels', tmp/'source'),
                     (*pip, 'install', '-q', '--no-deps', '--no-index', '--target', tmp/'installed', '--find-links', tmp/'wheels', 'meps_nb')):
            done = run(*map(str, step), cwd=tmp)
            if done.returncode: yield done.stdout; return
        missing = {name for name in modules(ROOT) if not (tmp/'installed'/name).is_file()}
        if missing: yield f'missing in the wheel: {sorted(missing)}'
        env = {**ENV, 'PYTHONPATH': str(tmp/'installed')}
        command = (sys.executable, str(tmp/'installed'/'bin'/'meps-study'))
        for arguments in (('--help',), ('--preset', 'smoke', '--out', 'result')):
            done = run(*command, *arguments, cwd=tmp, env=env)
            if done.returncode: yield f"meps-study {' '.join(arguments)}: {done.stdout}"
        if not (tmp/'result'/'report.html').is_file(): yield 'meps-study wrote no report'

CHECKS = [clean_and_exported, unique_names, known_directives, plain_docstrings, separate_imports, sound_outputs, in_the_sidebar, book_rendered, wheel_works]


# --- running them ---

def checked(check):
    start = time.time()
    try: problems = list(check())
    except Exception as e: problems = [f'{type(e).__name__}: {e}']
    return check.__doc__, problems, time.time() - start

def tested(path):
    "Run one notebook in a process of its own."
    start = time.time()
    done = run('nbdev-test', str(path), '--cell-timeout', CELL_TIMEOUT, '--n-workers', '0')
    good = done.returncode == 0 and 'Success.' in done.stdout    # a path that matches nothing also exits with 0
    return str(path.relative_to(ROOT)), [] if good else [done.stdout], time.time() - start

def main(words):
    jobs = [(tested, p) for p in notebooks() if not words or any(w in p.as_posix() for w in words)]
    if not words: jobs += [(checked, c) for c in CHECKS]
    results = Counter()
    with ThreadPoolExecutor(max(1, min(4, os.cpu_count() or 1))) as pool:
        for what, problems, seconds in pool.map(lambda job: job[0](job[1]), jobs):
            results[not problems] += 1
            print(f"{'FAILED' if problems else 'ok':6} {seconds:6.1f} s  {what}", *problems, sep='\n       ' if problems else '', flush=True)
    print(f'{results[True]} passed, {results[False]} failed')
    return bool(results[False] or not results)

if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
