#!/usr/bin/env bash
# ./run_multimodal.sh                create .venv, install the package, run the demo
# ./run_multimodal.sh test [ARGS...] install, then run the tests with pytest, in parallel unless ARGS has -n
# ./run_multimodal.sh COMMAND...     install, then run `nanochat COMMAND...` (train, eval, ask, chat, ...; --help lists them)
set -euo pipefail
cd "$(dirname "$0")"

python=${PYTHON:-python3}
venv=.venv
what=${1:-demo}
torch="torch" # a checkpoint needs it, a folder of `nanochat export` does not
more=""
for word in "$@"; do
  ! grep -qs '"format": "nanochat-onnx"' -- "$word/manifest.json" || torch=""
  case "$word" in --frames | *.mp4 | *.m4v | *.mov | *.mkv | *.webm | *.avi) more="video" ;; esac
done
case "$what" in
  test) torch="" more="dev" ;; # has all
  models | cache | tokenizer) torch="" ;;
  inspect) torch="" more="robot" ;;
  demo | record | demos | rollout) more="robot" ;;
  serve | policy-server) more="serve" ;;
  train) more="train,eval,photos" ;;
  eval) more="train,eval,robot" ;; # recordings of robots too
  import-upstream) more="upstream" ;;
esac
[ "$what ${2:-}" = "train robot" ] && more="train,eval,photos,robot" # its data has tables and videos
extras=${torch:+$torch${more:+,}}$more
extras=${extras:+[$extras]}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  { echo "Python 3.11 or newer is needed; found $("$python" --version). Set PYTHON to another interpreter." >&2; exit 2; }

# Install again only if pyproject.toml or constraints.txt has changed.
stamp="$venv/installed-${extras:-[]}"
wanted=$(cat pyproject.toml constraints.txt | cksum)
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
  echo "Installing nanochat-vision$extras into $venv (with PyTorch: a few minutes the first time)"
  # a .venv without pip was created by a Python without ensurepip (on Debian it is in python3-venv)
  "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".$extras"
  # the tests of the policy server use it; --no-deps because it requires numpy < 2, though it works with numpy 2
  [ "$what" != test ] || "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps openpi-client==0.1.2
  echo "$wanted" >"$stamp"
fi

if [ "$what" = test ]; then
  shift
  parallel="-n auto"
  for word in "$@"; do
    case "$word" in -n* | --numprocesses* | --dist* | --pdb) parallel="" ;; esac
  done
  # shellcheck disable=SC2086  # two words, or none
  exec "$venv/bin/python" -m pytest $parallel "$@"
fi
[ $# -gt 0 ] || set -- demo
exec "$venv/bin/nanochat" "$@"
