# Sourced by the common.sh here and in eval/ (not run): variables the environment may set, and what --help says of them.
SCRIPT=$(realpath "$0") # before anyone changes the folder
MINI=${MINI:-}
[[ $MINI != 0 ]] || MINI=
DRY_RUN=${DRY_RUN:-}
[[ $DRY_RUN != 0 ]] || DRY_RUN=
SETTINGS=()

# setting NAME DEFAULT MINI_DEFAULT HELP: a variable the environment may set; MINI=1 has defaults of its own.
setting() {
    local default=$2
    [[ -z $MINI ]] || default=$3
    printf -v "$1" '%s' "${!1-$default}"
    SETTINGS+=("$1" "$4")
}

# usage MINI_HELP REST: the script's own head, every setting with the value it has now, and REST.
usage() {
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$SCRIPT"
    printf '\nSettings (environment), with the values they have now:\n'
    local i
    for ((i = 0; i < ${#SETTINGS[@]}; i += 2)); do
        printf '  %-13s %s\n  %-13s   = %s\n' "${SETTINGS[i]}" "${SETTINGS[i + 1]}" "" "${!SETTINGS[i]}"
    done
    printf '  %-13s %s\n\n%s\n' MINI "$1" "$2"
}

# asks_for_help "$@": whether --help is among the arguments.
asks_for_help() {
    local argument
    for argument in "$@"; do
        [[ $argument != -h && $argument != --help ]] || return 0
    done
    return 1
}
