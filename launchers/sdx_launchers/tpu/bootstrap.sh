# What a worker does once for each set of dependencies; bash reads it from ssh's standard input.
#
# Before it stand SDX_ROOT (absolute), SDX_SNAPSHOT, SDX_ENV (a folder below the root), SDX_PYTHON
# (what has to be there afterwards) and two functions: sdx_setup, the user's lines, and sdx_install,
# the user's line or a call of sdx_default_install.

# The first Python on this machine that sdx runs on and that can make a virtual environment.
sdx_find_python() {
  local name
  for name in python3.13 python3.12 python3.11 python3; do
    if command -v "$name" >/dev/null 2>&1 && "$name" -c \
      'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
      >/dev/null 2>&1; then
      command -v "$name"
      return
    fi
  done
  return 1
}

# A virtual environment with all that the snapshot's pyproject.toml asks for, and the extras of a
# TPU worker. sdx itself is not installed: jobs take it from their snapshot.
sdx_default_install() {
  local python version
  local -a pip
  if python=$(sdx_find_python); then
    "$python" -m venv --clear "$SDX_ENV"
    pip=("$SDX_PYTHON" -m pip install --disable-pip-version-check --progress-bar off)
  else
    echo "no Python from 3.11 to 3.13 with venv here; uv brings one"
    python3 -m pip install --quiet --upgrade --target "$SDX_ROOT/uv" uv
    "$SDX_ROOT/uv/bin/uv" venv --clear --python 3.12 "$SDX_ENV"
    pip=("$SDX_ROOT/uv/bin/uv" pip install --python "$SDX_PYTHON")
  fi
  "$SDX_PYTHON" - "$SDX_SNAPSHOT/pyproject.toml" tpu gcs >"$SDX_ENV/requirements.txt" <<'PYTHON'
import sys, tomllib
with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)["project"]
lines = list(project["dependencies"])
for extra in sys.argv[2:]:
    lines += project.get("optional-dependencies", {}).get(extra, [])
print("\n".join(lines))
PYTHON
  version=$("$SDX_PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  if [ -f "$SDX_SNAPSHOT/constraints/py$version.txt" ]; then
    "${pip[@]}" -r "$SDX_ENV/requirements.txt" -c "$SDX_SNAPSHOT/constraints/py$version.txt"
  else
    "${pip[@]}" -r "$SDX_ENV/requirements.txt"
  fi
}

main() {
  set -euo pipefail
  mkdir -p "$SDX_ENV"
  cd "$SDX_ROOT"
  sdx_setup
  sdx_install
  "$SDX_PYTHON" -c 'import sys; print("sdx: installed for Python", sys.version.split()[0])'
  touch "$SDX_ENV/ready"
}

main </dev/null # commands that read would read the rest of this script
