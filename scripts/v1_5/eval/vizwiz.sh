#!/usr/bin/env bash
# VizWiz test, 8,000 questions: writes the upload of EvalAI challenge 1911.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

evaluate vizwiz vizwiz "$@"
submit vizwiz json "$@"
