#!/usr/bin/env bash
# ./run_multimodal.sh            make .venv, install the package, run the demo
# ./run_multimodal.sh test       the same, then the tests
# ./run_multimodal.sh COMMAND... the same, then `nanochat COMMAND...` (train, eval, ask, chat, ...; --help lists them)
set -euo pipefail
cd "$(dirname "$0")"

python=${PYTHON:-python3}
venv=.venv
what=${1:-demo}
extras=""
[ "$what" = test ] && extras="[dev]"
case "$what" in
  demo | demos | rollout | policy-server) extras="[robot]" ;;
  train | eval) extras="[train,eval]" ;;
  import-upstream) extras="[upstream]" ;;
esac

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  { echo "Python 3.11 or newer is needed; found $("$python" --version). Set PYTHON to another interpreter." >&2; exit 2; }

# Install again only when what is to be installed has changed.
stamp="$venv/installed-${extras:-[]}"
wanted=$(cat pyproject.toml constraints.txt | cksum)
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
  echo "Installing nanochat-vision$extras into $venv (PyTorch is large: a few minutes the first time)"
  # without pip: left behind by a Python that lacks ensurepip (Debian's is in python3-venv)
  "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".$extras"
  # the server's tests are driven by it; it asks for a numpy before 2 and works with ours
  [ "$what" != test ] || "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps openpi-client==0.1.2
  echo "$wanted" >"$stamp"
fi

if [ "$what" = test ]; then
  shift
  exec "$venv/bin/python" -m pytest "$@"
fi
[ $# -gt 0 ] || set -- demo
exec "$venv/bin/nanochat" "$@"
