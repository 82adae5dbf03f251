#!/usr/bin/env bash
# Makes .venv, installs the pinned packages and fetches the default weights; safe to run again at any time.
set -euo pipefail

root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
venv="$root/.venv"
# copies of the requirement files, written when their installation is complete
stamp="$venv/installed-requirements.txt"
dev_stamp="$venv/installed-requirements-dev.txt"

usage() {
    cat <<'TEXT'
Usage: ./setup.sh [--dev] [--bert-base] [--data [DIR]] [--help]

Makes .venv, installs the packages of requirements.txt into it and puts the
default weights into weights/all-MiniLM-L6-v2/. A second call does nothing;
an interrupted one is repaired by the next.

  --dev          also install requirements-dev.txt (for all of the tests)
  --bert-base    also download bert-base-uncased into weights/
  --data         also download the course's data into data/
  --data DIR     take the course's data from the folder DIR instead
  --help         show this text

PYTHON names the Python to use (3.11, 3.12 or 3.13), for example:
  PYTHON=python3.12 ./setup.sh

HTTPS_PROXY names a proxy. REQUESTS_CA_BUNDLE names a file of certificates, for
a network that has its own.
TEXT
}

stop() {
    echo "setup.sh: $2" >&2
    exit "$1"
}

version_of() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

supported() {
    case "$1" in
        3.11 | 3.12 | 3.13) return 0 ;;
        *) return 1 ;;
    esac
}

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        python="$PYTHON"
        version="$(version_of "$python")"
        [ -n "$version" ] || stop 2 "PYTHON=$PYTHON does not run; name a Python 3.11, 3.12 or 3.13 that does"
        supported "$version" ||
            stop 2 "PYTHON=$PYTHON is Python $version; name a Python 3.11, 3.12 or 3.13 instead"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11; do
        python="$candidate"
        version="$(version_of "$python")"
        if supported "$version"; then
            return
        fi
    done
    stop 2 "found no Python 3.11, 3.12 or 3.13; install one, or name it: PYTHON=/path/to/python3 ./setup.sh"
}

installed() {
    cmp -s "$root/requirements.txt" "$stamp" || return 1
    [ "$dev" = no ] || cmp -s "$root/requirements-dev.txt" "$dev_stamp"
}

last_error() {
    # pip's last error without its prefix, or the last line of the log
    { grep '^ERROR' "$log" || cat "$log"; } | tail -n 1 | sed 's/^ERROR: //'
}

pip_install() {
    local file="$1"
    shift
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@" -r "$root/$file" >"$log" 2>&1 ||
        stop 1 "$file could not be installed ($(last_error)); check the network and the system (torch has packages for\
 Linux with glibc 2.28 and for macOS 14 on Apple silicon), then run this again"
}

install_packages() {
    local file=requirements.txt venv_version
    if [ "$dev" = yes ]; then
        file=requirements-dev.txt
    fi
    venv_version="$(version_of "$venv/bin/python")"
    if [ -n "${PYTHON:-}" ]; then
        find_python
        if [ -e "$stamp" ] && [ -n "$venv_version" ] && [ "$venv_version" != "$version" ]; then
            stop 2 ".venv has Python $venv_version, PYTHON=$PYTHON is Python $version; remove .venv to change"
        fi
    fi
    if [ -n "$venv_version" ] && installed; then
        return
    fi
    # without its stamp .venv is incomplete: pip may list packages in it that were copied only in part
    if [ -z "$venv_version" ] || [ ! -e "$stamp" ]; then
        find_python
        echo "Making .venv with Python $version"
        "$python" -m venv --clear "$venv" >"$log" 2>&1 || stop 1 "$python -m venv failed ($(last_error));\
 on Debian and Ubuntu install python$version-venv, then run this again"
    fi
    echo "Installing $file into .venv (some minutes the first time)"
    # without a network a complete .venv must stay complete: the dry run fails before anything is changed
    [ ! -e "$stamp" ] || pip_install "$file" --dry-run
    rm -f "$stamp" "$dev_stamp"
    pip_install "$file"
    if [ "$dev" = yes ]; then
        cp "$root/requirements-dev.txt" "$dev_stamp"
    fi
    cp "$root/requirements.txt" "$stamp"
}

dev=no
bert_base=no
data=no
data_folder=
while [ $# -gt 0 ]; do
    case "$1" in
        --dev) dev=yes ;;
        --bert-base) bert_base=yes ;;
        --data)
            data=yes
            case "${2:-}" in
                '' | -*) ;;
                *)
                    [ -d "$2" ] || stop 2 "--data $2: there is no such folder"
                    data_folder="$(CDPATH='' cd -- "$2" && pwd)"
                    shift
                    ;;
            esac
            ;;
        --help | -h)
            usage
            exit 0
            ;;
        *) stop 2 "unknown option $1; ./setup.sh --help lists them" ;;
    esac
    shift
done

log="$(mktemp "${TMPDIR:-/tmp}/minbert-setup.XXXXXX" 2>/dev/null)" ||
    stop 2 "TMPDIR=${TMPDIR:-/tmp}: no temporary file can be made there; name a folder that can be written"
trap 'rm -f "$log"' EXIT
install_packages

fetch() {
    "$venv/bin/python" "$root/download.py" "$@"
}

# each step prints its own error in one line; the steps after it still run
status=0
fetch minilm || status=1
if [ -n "$data_folder" ]; then
    fetch data --from "$data_folder" || status=$?
elif [ "$data" = yes ]; then
    fetch data || status=1
fi
if [ "$bert_base" = yes ]; then
    fetch bert-base || status=1
fi
if [ "$status" = 0 ]; then
    echo "Ready: .venv/bin/python"
fi
exit "$status"
