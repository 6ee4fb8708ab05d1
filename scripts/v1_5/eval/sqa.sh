#!/usr/bin/env bash
# ScienceQA test, 4,241 questions: accuracy on those with a picture. PROTOCOL=crop is how the PruMerge fork
# and LLaVA before 2024 showed the pictures.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

evaluate scienceqa scienceqa "$@"
