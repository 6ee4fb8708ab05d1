#!/usr/bin/env bash
# MME, 2,374 questions: Perception and Cognition.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

evaluate mme MME "$@"
