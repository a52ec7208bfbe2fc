#!/usr/bin/env bash
# Installs Outstation as a service on Raspberry Pi OS or Debian. Run it again to upgrade: config and data stay.
#
#   sudo deploy/install.sh                      from the checkout it lies in; a device without a fleet
#   sudo deploy/install.sh --broker URL         the same, with a broker on another machine
#   sudo deploy/install.sh outstation-….whl     from a wheel
#   sudo deploy/install.sh --code CODE          joins with the code of `outstation fleet invite`; - reads it from standard input
#   sudo deploy/install.sh --request FLEET/DEVICE --token TOKEN   makes the keys, and the request for the operator
#   sudo deploy/install.sh --join FILE          joins with what `outstation fleet enrol --bundle-out` wrote; data stay.
#                                               --replace: also where files differ; each is kept as NAME.before-join
#   sudo deploy/install.sh --extras images,parquet   for streams of images, for Parquet files; upgrades keep them
#   sudo deploy/install.sh --rollback           back to the version before the last upgrade
#   sudo deploy/install.sh --uninstall          the program goes; config, keys and data stay
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
program=/opt/outstation  # a link to the version in use, beneath …
versions=/opt/outstation.versions
config=/etc/outstation
data=/var/lib/outstation
unit=/etc/systemd/system/outstation.service
command=/usr/local/bin/outstation
declare -A completions=(
    [bash]=/usr/share/bash-completion/completions/outstation
    [zsh]=/usr/share/zsh/vendor-completions/_outstation
    [fish]=/usr/share/fish/vendor_completions.d/outstation.fish
)

say() { echo "outstation: $*"; }
die() { echo "outstation: $1" >&2; exit "${2:-1}"; }
usage() { sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
systemd_runs() { [[ -d /run/systemd/system ]]; }
version() { "$program/bin/python" -c 'import outstation; print("version", outstation.__version__)'; }

main() {
    local source="" join=() request="" token="" replace="" broker="" action=install
    extras=$(cat "$program/.extras" 2>/dev/null || true)
    while [[ $# != 0 ]]; do
        case $1 in
            --join) join=("${2:-}"); [[ -f ${2:-} && -r ${2:-} ]] || die "--join needs a file that can be read" 2; shift ;;
            --code) join=(--code "${2:-}"); [[ -n ${2:-} ]] || die "--code needs what fleet invite printed" 2; shift ;;
            --replace) replace=--replace ;;
            --request) request=${2:-}; [[ $request == ?*/?* ]] || die "--request needs FLEET/DEVICE, as acme/pi-07" 2; shift ;;
            --broker) broker=${2:-}; [[ -n $broker ]] || die "--broker needs a URL, as mqtt://127.0.0.1:1883" 2; shift ;;
            --token) token=${2:-}; [[ -n $token ]] || die "--token needs what fleet devices token printed" 2; shift ;;
            --extras) [[ ${2-} =~ ^[a-z,]*$ ]] || die "--extras needs names with commas, as images,parquet" 2; extras=${2-}; shift ;;
            --rollback | --uninstall) action=${1#--} ;;
            -h | --help) usage; exit 0 ;;
            -*) die "$1 is no option; --help lists them" 2 ;;
            *) source=$1 ;;
        esac
        shift
    done
    [[ $EUID == 0 ]] || die "this changes the system and must run as root: sudo $0" 2
    case $action in
        rollback) roll_back ;;
        uninstall) uninstall ;;
        install)
            source=$(find_source "$source")
            install_program "$source"
            make_user
            if [[ -n $request ]]; then
                "$program/bin/outstation" request "$config" --fleet "${request%%/*}" --id "${request#*/}" ${token:+--token "$token"}
                give_files
                say "the keys stay in $config; take the request to the operator, and run this again with --join"
                exit 0
            fi
            if [[ ${#join[@]} != 0 ]]; then join_fleet "${join[@]}" ${replace:+"$replace"}; else make_config "$broker"; fi
            give_files
            install_service
            ;;
    esac
}

find_source() { # ARGUMENT: the wheel, or the checkout around this script
    local source=${1:-$here/..}
    if [[ -d $source && -e $source/pyproject.toml ]]; then
        (cd "$source" && pwd)
    elif [[ -f $source && $source == *.whl ]]; then
        realpath "$source"
    else
        die "$source is neither a wheel nor a checkout; give a wheel: sudo $0 outstation-….whl" 2
    fi
}

fingerprint() { # SOURCE: changes when what would be installed changes
    if [[ -d $1 ]]; then
        (cd "$1" && find agent models deploy pyproject.toml -type f -not -name '*.pyc' -print0 | sort -z | xargs -0 sha256sum)
    else
        sha256sum <"$1"
    fi | cat - <(python3 -VV; echo "$extras") | sha256sum | cut -d' ' -f1
}

# --- the program: each version in a folder of its own, so that an upgrade cut short leaves the old one whole

install_program() { # SOURCE
    local wanted folder before
    [[ $(dpkg-query -W -f '${Status}' outstation 2>/dev/null) != *" installed" ]] ||
        die "the Debian package outstation is installed; upgrade it with apt-get, or first, keeping config and data: apt-get remove outstation" 2
    need_packages
    wanted=$(fingerprint "$1")
    if [[ -e $program/.source && $(<"$program/.source") == "$wanted" ]]; then
        say "the program is up to date: $(version)"
        return
    fi
    folder=$versions/$(date -u +%Y%m%d-%H%M%S)
    mkdir -p "$versions"
    say "installing from $1 into $folder (a few minutes on a small machine)"
    fill "$folder" "$1" || { rm -rf "$folder"; die "the program could not be installed, see above; what was installed before is untouched"; }
    echo "$extras" >"$folder/.extras"
    echo "$wanted" >"$folder/.source"
    sync
    before=$(readlink "$program" || true)
    activate "$folder"
    # The version before stays for --rollback; older ones and those that were cut short go.
    find "$versions" -mindepth 1 -maxdepth 1 -not -path "$folder" -not -path "$before" -exec rm -rf {} +
    say "installed $(version) in $program"
}

need_packages() {
    local missing=() package
    command -v apt-get >/dev/null || die "apt-get is not here: this script knows Raspberry Pi OS and Debian only" 2
    local packages=(python3 python3-venv ca-certificates libseccomp2)
    if bits32; then
        say "32-bit ARM needs an ARMv7 processor, Python 3.11 (Debian 12), Debian's numpy, and a compiler for cffi, msgspec and psutil"
        [[ $(uname -m) != armv6* ]] || die "this processor is $(uname -m): the TFLite runtime needs ARMv7, as in a Raspberry Pi 2 or later" 2
        packages+=(python3-numpy gcc libc6-dev libffi-dev python3-dev)
    fi
    for package in "${packages[@]}"; do
        [[ $(dpkg-query -W -f '${Status}' "$package" 2>/dev/null) == *" installed" ]] || missing+=("$package")
    done
    if [[ ${#missing[@]} != 0 ]]; then
        say "installing ${missing[*]}"
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
    fi
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "$(python3 -V) is too old, 3.11 is needed: Debian 12 (bookworm) or later" 2
    if bits32; then
        python3 -c 'import sys; sys.exit(sys.version_info >= (3, 12))' ||
            die "the TFLite runtime for 32-bit ARM ends at Python 3.11: use Debian 12 (bookworm), or a 64-bit system" 2
    fi
}

bits32() { # also where the kernel is a 64-bit one, as on Raspberry Pi OS (32-bit)
    [[ $(dpkg --print-architecture) == armhf ]]
}

fill() { # FOLDER SOURCE: every library in the version and with the hash that the lock names, then the program alone
    local python=$1/bin/python builder=$1/build/bin/python lock=requirements.txt site=() names=()
    local quiet=(--disable-pip-version-check --no-cache-dir -q --no-deps)
    if bits32; then lock=requirements-armv7.txt site=(--system-site-packages); fi
    python3 -m venv "${site[@]}" "$1" || return
    mkdir "$1/lock" || return
    if [[ -d $2 ]]; then
        cp "$2/deploy/$lock" "$1/lock/all.txt" || return
    else
        "$python" -c 'import sys, zipfile; print(zipfile.ZipFile(sys.argv[1]).read(sys.argv[2]).decode(), end="")' \
            "$2" "outstation/shipped/deploy/$lock" >"$1/lock/all.txt" || return
    fi
    IFS=, read -ra names <<<"$extras"
    select_sections "$1/lock/all.txt" device "${names[@]}" >"$1/lock/wanted.txt" || return
    if bits32 || [[ -d $2 ]]; then
        # What builds a package is not installed with it.
        python3 -m venv "$1/build" && select_sections "$1/lock/all.txt" build >"$1/lock/build.txt" &&
            "$builder" -m pip install "${quiet[@]}" --require-hashes -r "$1/lock/build.txt" || return
    fi
    if bits32; then
        # PyPI has only the sources of some: they are compiled with the locked tools, not with the newest.
        "$builder" -m pip wheel "${quiet[@]}" --require-hashes --no-build-isolation -w "$1/lock" -r "$1/lock/wanted.txt" &&
            "$python" -m pip install "${quiet[@]}" --no-index "$1"/lock/*.whl && rm "$1"/lock/*.whl || return
    else
        "$python" -m pip install "${quiet[@]}" --require-hashes -r "$1/lock/wanted.txt" || return
    fi
    if [[ -d $2 ]]; then
        "$builder" -m pip wheel "${quiet[@]}" --no-build-isolation -w "$1/lock" "$2" || return
        set -- "$1" "$1"/lock/*.whl
    fi
    rm -rf "$1/build"
    "$python" -m pip install "${quiet[@]}" --no-index "$2"
}

select_sections() { # LOCK NAME…: those sections, without numpy on 32-bit ARM, where Debian's is used
    local lock=$1 name skipped=""
    shift
    for name; do
        grep -qx "# section $name" "$lock" || { say "there is no extra $name for this machine in $lock" >&2; return 1; }
    done
    if bits32; then skipped=numpy; fi
    awk -v wanted=" $* " -v skipped="$skipped" '
        /^# section / { on = index(wanted, " " $3 " "); next }
        /^#/ { next }
        /^[^ ]/ { split($1, name, "=="); skip = name[1] == skipped }
        on && !skip' "$lock"
}

activate() { # FOLDER: in one step, the link is never missing
    if [[ -d $program && ! -L $program ]]; then
        die "$program is a folder, not a link that this script made; move it away and run this again"
    fi
    ln -sfn "$1" "$program.new"
    mv -T "$program.new" "$program"
    ln -sfn "$program/bin/outstation" "$command"
    local shell file
    for shell in "${!completions[@]}"; do
        file=${completions[$shell]}
        [[ ! -d ${file%/*} ]] || _OUTSTATION_COMPLETE=${shell}_source "$command" >"$file" || rm -f "$file"
    done
}

roll_back() {
    local current before
    current=$(readlink "$program") || die "nothing is installed, so there is nothing to go back to"
    before=$(dirname "$(find "$versions" -maxdepth 2 -name .source -not -path "$current/*" | sort | tail -n 1)")
    [[ $before != . ]] || die "there is no version before this one"
    [[ $(basename "$before") < $(basename "$current") ]] ||
        die "$(version) is the older of the two that are kept; to go forward, run: sudo $0"
    activate "$before"
    say "back to $(version); it came from $before"
    if systemd_runs; then systemctl try-restart outstation; fi
}

# --- config and service

make_user() {
    if ! getent passwd outstation >/dev/null; then
        useradd --system --user-group --home-dir "$data" --shell /usr/sbin/nologin outstation
        say "made the user outstation; members of its group may talk to the intake socket"
    fi
    # The config is root's, and the service reads it. What root changes here, nobody else can swap meanwhile.
    install -d -o root -g outstation -m 0750 "$config"
    install -d -o outstation -g outstation -m 0750 "$data"
}

make_config() { # BROKER: for a device without a fleet
    if [[ -e $config/outstation.toml ]]; then
        say "kept $config/outstation.toml"
    else
        "$program/bin/outstation" init "$config" --standalone --data-dir "$data" ${1:+--broker "$1"}
    fi
}

join_fleet() { # ARGUMENTS of `outstation join`: while it joins, no daemon may use the data
    local was_running=""
    if systemd_runs && systemctl -q is-active outstation; then
        was_running=yes
        systemctl stop outstation
    fi
    "$program/bin/outstation" join "$@" --dir "$config" --data-dir "$data" || {
        [[ -z $was_running ]] || systemctl start outstation
        die "the device did not join, see above"
    }
}

give_files() {
    # Only the device's files, with one name: any other file of this folder keeps its owner and mode.
    local name keys=() others=()
    for name in device.key device-tls.key; do keys+=(-o -name "$name" -o -name "$name.before-join"); done
    for name in outstation.toml ca.pem device.crt root.json; do others+=(-o -name "$name" -o -name "$name.before-join"); done
    local files=(find "$config" -maxdepth 1 -type f -links 1)
    "${files[@]}" \( -name device.key.pub "${others[@]}" \) -exec chown root:outstation {} + -exec chmod 0640 {} +
    # Members of the group may use the intake socket, and have no business with the keys.
    "${files[@]}" \( -false "${keys[@]}" \) -exec chown outstation:outstation {} + -exec chmod 0600 {} +
}

install_service() {
    install -m 0644 "$here/outstation.service" "$unit"
    if ! ready; then
        say "the service is installed and not started: fix the problems above in $config/outstation.toml, then run this again"
    elif ! systemctl enable -q outstation 2>/dev/null; then
        say "there is no systemd here: start it yourself, with $program/bin/outstation run"
    elif ! systemd_runs; then
        say "systemd is not running here: the service starts with the next boot"
    else
        systemctl daemon-reload
        systemctl restart outstation || die "the service did not start; see: journalctl -u outstation"
        say "the service is running; see: sudo outstation status"
    fi
}

ready() { # would the daemon start with this config? Broker and repository may be out of reach now.
    local report
    report=$(runuser -u outstation -- "$program/bin/outstation" check --json -c "$config/outstation.toml") || true
    [[ -n $report ]] && "$program/bin/python" -c '
import json, sys
failed = [one for one in json.load(sys.stdin) if one["state"] == "failed" and one["name"] not in ("broker", "updates")]
for one in failed:
    print("outstation:", one["name"] + ":", one["detail"])
sys.exit(bool(failed))' <<<"$report"
}

uninstall() {
    if systemd_runs; then systemctl disable -q --now outstation 2>/dev/null || true; fi
    rm -f "$unit" "$command" "$program" "${completions[@]}"
    rm -f /etc/systemd/system/multi-user.target.wants/outstation.service
    rm -rf "$versions"
    if systemd_runs; then systemctl daemon-reload; fi
    say "the program and its service are gone"
    say "kept: $config (config and keys), $data (readings, results, outbox), the user outstation"
    say "to delete them too: rm -r $config $data $data.moved && userdel outstation"
}

main "$@"
