#!/usr/bin/env bash
# MM-Vet, 218 questions: writes what the official notebook grades (llava score mm-vet reads its grades).
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

evaluate mm-vet mm-vet "$@"
submit mm-vet json "$@"
