#!/usr/bin/env bash
# POPE, 8,910 questions: mean F1 over adversarial, popular and random.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

evaluate pope pope "$@"
