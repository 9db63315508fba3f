#!/usr/bin/python3
"""Build and run every test: what `make check` runs once the packages are there.

A line per suite, the names of what failed and what was skipped, and a closing line "N passed, N failed, N skipped".
Status 0 only if nothing failed.
"""
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree

TOP = pathlib.Path(__file__).resolve().parent.parent
MESON = '/usr/bin/meson'
PYTHON = '/usr/bin/python3'
STEP_SECONDS = 900

# gcc for what is shipped, clang for the sanitizers: both compilers see every line.
BUILDS = {
	'build': ('gcc', []),
	'build-san': ('clang', ['-Db_sanitize=address,undefined', '-Db_lundef=false']),
}

passed, failed, skipped = [], [], []


def run(argv, stdout=None, **kw):
	"""Run a step with its output shown, in a process group of its own; its status, 124 where the time was up."""
	sys.stdout.flush()
	child = subprocess.Popen([str(a) for a in argv], cwd=TOP, stdin=subprocess.DEVNULL, stdout=stdout,
		stderr=subprocess.STDOUT, start_new_session=True, **kw)
	try:
		return child.wait(STEP_SECONDS)
	except subprocess.TimeoutExpired:
		print(f'{argv[0]}: not done after {STEP_SECONDS} s')
		return 124
	finally:
		if child.poll() is None:
			os.killpg(child.pid, signal.SIGKILL)
			child.wait()


def suite(name, step):
	"""Run a step and say in one line what it found."""
	before, began = (len(passed), len(failed), len(skipped)), time.monotonic()
	print(f'--- {name}', flush=True)
	step()
	p, f, s = (now - then for now, then in zip((len(passed), len(failed), len(skipped)), before))
	print(f'=== {name}: {p} passed, {f} failed, {s} skipped ({time.monotonic() - began:.0f} s)', flush=True)


def build(directory):
	compiler, options = BUILDS[directory]
	env = dict(os.environ, CC=compiler)
	path = TOP / directory
	log = ''
	if not (path / 'build.ninja').exists():
		done = subprocess.run([MESON, 'setup', str(path), *options], cwd=TOP, env=env, stdin=subprocess.DEVNULL,
			stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
		log = done.stdout
		if done.returncode:
			print(log)
			failed.append(f'{directory}: meson setup')
			return
	done = subprocess.run(['ninja', '-C', str(path)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
		stderr=subprocess.STDOUT, text=True)
	if done.returncode:
		print(done.stdout[-20000:])
		failed.append(f'{directory}: does not build')
	else:
		passed.append(f'{directory}: builds without a warning')


def meson_row(directory, row):
	"""One test executable: Check's own counts where it has them, else the executable is the test."""
	name = f'{directory}: {row["name"]}'
	out = row.get('stdout') or ''
	counts = re.search(r'Checks: (\d+), Failures: (\d+), Errors: (\d+)', out)
	if row['result'] == 'SKIP':
		skipped.append(f'{name}: {out.strip().splitlines()[-1] if out.strip() else "no reason given"}')
	elif row['result'] == 'OK':
		passed.extend([name] * (int(counts[1]) if counts else 1))
	else:
		tests = re.findall(r'^[^\n]*:[FE]:[^\n]*', out, re.M)
		passed.extend([name] * (int(counts[1]) - len(tests) if counts else 0))
		failed.extend([f'{name}: {t}' for t in tests] or [f'{name}: {row["result"]}'])
		print(out[-4000:], (row.get('stderr') or '')[-8000:], sep='\n')


def meson_tests(directory, *suites):
	path = TOP / directory
	log = path / 'meson-logs/testlog.json'
	log.unlink(missing_ok=True)
	argv = [MESON, 'test', '-C', path, '--no-rebuild', '--quiet']
	for s in suites:
		argv += ['--suite', s]
	run(argv, stdout=subprocess.DEVNULL, env=dict(os.environ, CK_VERBOSITY='normal'))
	if not log.exists():
		failed.append(f'{directory}: meson test ran nothing')
		return
	for row in log.read_text().splitlines():
		meson_row(directory, json.loads(row))


def pytest(path, *args, directory='build'):
	report = TOP / directory / 'pytest.xml'
	report.unlink(missing_ok=True)
	status = run([PYTHON, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', f'--junitxml={report}', *args, path],
		env=dict(os.environ, VMM_BUILD=str(TOP / directory)))
	if not report.exists():
		failed.append(f'{path}: pytest ended with status {status}')
		return
	for case in xml.etree.ElementTree.parse(report).iter('testcase'):
		name = f'{directory}: {case.get("classname")}.{case.get("name")}'
		if case.find('failure') is not None or case.find('error') is not None:
			failed.append(name)
		elif case.find('skipped') is not None:
			skipped.append(f'{name}: {case.find("skipped").get("message")}')
		else:
			passed.append(name)
	if status not in (0, 1):
		failed.append(f'{path}: pytest ended with status {status}')


def bed():
	report = TOP / 'build/bed.json'
	report.unlink(missing_ok=True)
	status = run([PYTHON, 'tests/nested/bed.py', '--results', report])
	if not report.exists():
		failed.append(f'bed: no results, status {status}')
		return
	for row in json.loads(report.read_text()):
		name = f'bed: {row["name"]}'
		(passed if row['outcome'] == 'pass' else failed).append(
			name if row['outcome'] == 'pass' else f'{name}: {row["words"]}')


def main():
	began = time.monotonic()
	for directory in BUILDS:
		suite(f'build {directory}', lambda d=directory: build(d))
	if not failed:
		suite('unit tests, fuzz corpora, guest payloads', lambda: meson_tests('build'))
		suite('the same with sanitizers', lambda: meson_tests('build-san', 'unit', 'fuzz'))
		suite('vmm as a user runs it', lambda: pytest('tests/e2e'))
		suite('the same with sanitizers', lambda: pytest('tests/e2e', '-m', 'not release', directory='build-san'))
		suite('stock Linux guests', bed)
		suite('make demo and its tools', lambda: pytest('tests/nested'))
	for title, names in (('skipped', skipped), ('failed', failed)):
		if names:
			print(f'{title}:')
			print(''.join(f'  {n}\n' for n in names), end='')
	print(f'in {time.monotonic() - began:.0f} s')
	print(f'{len(passed)} passed, {len(failed)} failed, {len(skipped)} skipped', flush=True)
	return 1 if failed else 0


if __name__ == '__main__':
	sys.exit(main())
