#!/bin/sh
# Install what vmm needs from Debian: setup.sh build|demo|check ... Quick and silent when all is there.
set -eu

build='gcc meson ninja-build pkg-config libc6-dev liburing-dev libslirp-dev libglib2.0-dev libseccomp-dev
	zlib1g-dev libzstd-dev liblzma-dev liblz4-dev libjson-c-dev libcapstone-dev check python3'
bed='qemu-system-x86 busybox-static e2fsprogs xfsprogs lz4 zstd xz-utils binutils'
check='clang libclang-rt-14-dev qemu-utils python3-pytest acpica-tools iproute2 util-linux'
bench='fio'

want=
for group; do
	case $group in
	build) want="$want $build" ;;
	demo) want="$want $build $bed" ;;
	check) want="$want $build $bed $check" ;;
	bench) want="$want $build $bed $bench" ;;
	*) echo "usage: setup.sh build|demo|check|bench ..." >&2; exit 2 ;;
	esac
done

have=$(dpkg-query -W -f='${db:Status-Status} ${Package}\n' 2>/dev/null | sed -n 's/^installed //p')
missing=
for p in $want; do
	printf '%s\n' "$have" | grep -qxF "$p" || missing="$missing $p"
done
[ -n "$missing" ] || exit 0

root=
if [ "$(id -u)" != 0 ]; then
	if ! command -v sudo >/dev/null || ! sudo -n true 2>/dev/null && ! [ -t 0 ]; then
		echo "missing Debian packages; as root, run: apt-get install --no-install-recommends$missing" >&2
		exit 1
	fi
	root=sudo
fi
echo "installing$missing" | fold -s -w 100
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# shellcheck disable=SC2086
if ! { $root apt-get update -qq &&
	$root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing; } \
	</dev/null >"$log" 2>&1; then
	cat "$log" >&2
	echo "apt-get could not install:$missing" >&2
	exit 1
fi
