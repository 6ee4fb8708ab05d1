#!/usr/bin/env bash
# VQAv2 test-dev, 107,394 questions: writes the upload of EvalAI challenge 830.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

evaluate vqav2 vqav2 "$@"
submit vqav2 json "$@"
