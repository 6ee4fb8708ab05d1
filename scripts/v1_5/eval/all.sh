#!/usr/bin/env bash
# Every script of this folder, one after the other, and the table of all runs. With MINI=1 the six of the paper. A benchmark that fails does not stop the others; the exit status tells.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

! asks_for_help "$@" || help_and_exit
if [[ -n $MINI ]]; then
    all=(vqav2 textvqa mme pope sqa mmbench)
else
    mapfile -t all < <(basename -s .sh scripts/v1_5/eval/*.sh | grep -vx -e all -e common)
fi
failed=()
for name in "${all[@]}"; do
    echo "== $name" >&2
    bash "scripts/v1_5/eval/$name.sh" "$@" || failed+=("$name")
done
run "$PYTHON" -m llava.cli report "$ROOT" --html "$ROOT/report.html" --json "$ROOT/report.json"
[[ ${#failed[@]} -eq 0 ]] || { echo "failed: ${failed[*]}" >&2 && exit 1; }
