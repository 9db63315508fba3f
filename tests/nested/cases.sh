#!/bin/sh
# Stock Linux guests under vmm, one after another. Runs under busybox sh: inside the emulated bed, or on the host in
# namespaces of its own (bed.py chooses), with
#   VMM BED KERNELS INITRD XFS WORK RESULTS ONLY  vmm, its helpers' directory, vmlinuz and vmlinux, the guest's
#                                                 archive, one with xfs, a scratch directory, where results go, name patterns
# and /etc/resolv.conf pointing to 127.0.0.1. Each case and each of its guest's claims is one line in $RESULTS:
#   RESULT NAME pass|fail SECONDS WORDS
# followed, for a failed case, by LOG lines.

PATH=$BED:/bin:/sbin:/usr/bin:/usr/sbin
export PATH
MEM=256M
SERVER=198.51.100.1     # TEST-NET-2: an address that is not loopback, on the loopback interface
quiet='quiet console=ttyS0'

now()
{
	read -r up _ </proc/uptime
	echo "${up%.*}${up#*.}"
}

seconds()
{
	echo "$(($1 / 100)).$(printf %02d $(($1 % 100)))"
}

result()
{
	echo "RESULT $*" >>"$RESULTS"
}

# Why the case in progress failed; the first reason stands.
fail()
{
	[ -n "$why" ] || why=$*
}

# The other side's part when a guest says READY; a case may define its own.
on_ready()
{
	:
}

# One line of the guest's console.
heard()
{
	line=${1%"$cr"}
	echo "$line" >>"$WORK/transcript"
	case $line in
	*"CHECK ok "*)
		result "$case/${line##*CHECK ok }" pass 0
		checks=$((checks + 1))
		;;
	*"CHECK FAILED "*)
		name=${line##*CHECK FAILED }
		result "$case/${name%%:*}" fail 0 "${name#*: }"
		fail "${name}"
		;;
	*"NOTE "*)
		echo "NOTE $case: ${line##*NOTE }" >>"$RESULTS"
		;;
	*"READY "*)
		on_ready "${line##*READY }"
		;;
	esac
}

# boots STATUS CHECKS LIMIT STEPS MACHINE KERNEL CPUS ARG…: run a guest to its end. The case fails unless vmm ends with
# STATUS within LIMIT seconds, says the same in its result file (not where it is lost=yes: killed) and the guest made CHECKS successful claims.
boots()
{
	want=$1 claims=$2 limit=$3 steps=$4 machine=$5 kernel=$6 cpus=$7
	shift 7
	checks=0
	rm -f "$WORK/result.json" "$WORK/console"
	mkfifo "$WORK/console"
	timeout -k 5 $((limit + 15)) "$VMM" --machine "$machine" --kernel "$KERNELS/$kernel" --initrd "$INITRD" \
		--mem $MEM --cpus "$cpus" --timeout "$limit" --result "$WORK/result.json" \
		--cmdline "$quiet vmm.steps=$steps vmm.cpus=$cpus vmm.min_kb=180000 $words" "$@" \
		</dev/null >"$WORK/console" 2>>"$WORK/stderr" &
	vmm_pid=$!
	while IFS= read -r line || [ -n "$line" ]; do
		heard "$line"
	done <"$WORK/console"
	wait $vmm_pid
	status=$?
	[ "$status" = "$want" ] || fail "status $status, not $want"
	[ "$checks" = "$claims" ] || fail "$checks of $claims claims"
	[ -n "$lost" ] || grep -Eq "\"status\": ?$status[,}]" "$WORK/result.json" 2>/dev/null || fail "the result file does not say status $status"
}

new_disk()
{
	rm -f "$WORK/disk"
	truncate -s 64M "$WORK/disk"
	mkfs.ext4 -q -F "$WORK/disk" >>"$WORK/stderr" 2>&1 || fail "mkfs.ext4"
}

# The guest's file system is clean, and its file has the sum the guest computed.
check_disk()
{
	e2fsck -fn "$WORK/disk" >>"$WORK/stderr" 2>&1 || fail "e2fsck finds errors"
	told=$(sed -n 's/.*NOTE sum //p' "$WORK/transcript" | head -n 1)
	found=$(debugfs -R 'cat /random' "$WORK/disk" 2>/dev/null | sha256sum | cut -c 1-64)
	[ "$told" = "$found" ] || fail "the file's sum is $found, the guest said '$told'"
}

# --- cases: names as they are reported, dashes for underscores ---

case_boot_pc_bzimage_1_cpu() { boots 0 3 60 boot pc vmlinuz 1 --net none; }
case_boot_pc_vmlinux_4_cpus() { boots 0 3 90 boot pc vmlinux 4 --net none; }
case_boot_microvm_bzimage_4_cpus() { boots 0 3 90 boot microvm vmlinuz 4 --net none; }
case_boot_microvm_vmlinux_1_cpu() { boots 0 3 60 boot microvm vmlinux 1 --net none; }
case_boot_pc_bzimage_own_entry() { boots 0 3 90 boot pc vmlinuz 1 --net none --kernel-entry=bzimage; }

# No console= on the command line: vmm sees to it.
case_boot_finds_its_console()
{
	quiet=quiet
	boots 0 3 60 boot pc vmlinuz 1 --net none
}

case_disk_pc()
{
	new_disk
	boots 0 4 60 disk_write pc vmlinuz 2 --net none --disk "$WORK/disk"
	check_disk
	boots 0 4 60 disk_check pc vmlinuz 1 --net none --disk "$WORK/disk"
	check_disk
}

case_disk_microvm()
{
	new_disk
	boots 0 4 60 disk_write microvm vmlinux 2 --net none --disk "$WORK/disk,queues=2"
	check_disk
	boots 0 4 60 disk_check microvm vmlinux 1 --net none --disk "$WORK/disk"
	check_disk
}

case_disk_read_only()
{
	new_disk
	before=$(sha256sum "$WORK/disk")
	words="vmm.serial=a-serial vmm.sectors=131072"
	boots 0 4 60 disk_serial pc vmlinuz 1 --net none --disk "$WORK/disk,serial=a-serial,readonly=on"
	[ "$before" = "$(sha256sum "$WORK/disk")" ] || fail "the read-only disk changed"
}

qcow2()
{
	"$VMM" disk "$@" >>"$WORK/stderr" 2>&1
}

# Clean, or space that nobody uses: never worse.
check_qcow2()
{
	qcow2 check -f qcow2 "$1"
	case $? in
	0 | "$2") ;;
	*) fail "vmm disk check: status $?" ;;
	esac
}

kib()
{
	du -k "$1" | cut -f 1
}

# A disk whose writes go to an overlay; what the guest trims, the overlay gives back.
case_disk_qcow2_backing()
{
	new_disk
	before=$(sha256sum "$WORK/disk")
	rm -f "$WORK/over.qcow2" "$WORK/flat"
	qcow2 create -f qcow2 -b disk -F raw "$WORK/over.qcow2" || fail "vmm disk create"
	disk=$WORK/over.qcow2,format=qcow2,backing=allow
	boots 0 4 60 disk_write pc vmlinuz 2 --net none --disk "$disk"
	boots 0 4 60 disk_check microvm vmlinuz 1 --net none --disk "$disk"
	check_qcow2 "$WORK/over.qcow2" 0
	full=$(kib "$WORK/over.qcow2")
	[ "$full" -gt 8000 ] || fail "8 MiB of data in $full KiB"
	qcow2 convert --backing=allow -f qcow2 -O raw "$WORK/over.qcow2" "$WORK/flat" || fail "vmm disk convert"
	[ "$before" = "$(sha256sum "$WORK/disk")" ] || fail "the backing file changed"
	boots 0 4 60 disk_trim pc vmlinuz 1 --net none --disk "$disk"
	[ "$(kib "$WORK/over.qcow2")" -lt $((full - 7000)) ] || fail "$full KiB before the trim, $(kib "$WORK/over.qcow2") after"
	check_qcow2 "$WORK/over.qcow2" 0
	mv "$WORK/flat" "$WORK/disk"
	check_disk
}

# Many guests on one file that nobody changes.
case_disk_snapshot()
{
	new_disk
	before=$(sha256sum "$WORK/disk")
	boots 0 4 60 disk_write microvm vmlinuz 1 --net none --disk "$WORK/disk,snapshot"
	[ "$before" = "$(sha256sum "$WORK/disk")" ] || fail "the file changed"
}

# killed FS: vmm is killed while the guest writes; image and file system must be in order afterwards.
killed()
{
	words="vmm.fs=$1${2:+ vmm.with=$2}"
	rm -f "$WORK/k.qcow2" "$WORK/flat"
	qcow2 convert -f raw -O qcow2 "$WORK/disk" "$WORK/k.qcow2" || fail "vmm disk convert to qcow2"
	disk=$WORK/k.qcow2,format=qcow2
	on_ready() { usleep 700000; kill -KILL $vmm_pid; }
	lost=yes
	boots 137 1 60 disk_load microvm vmlinuz 1 --net none --disk "$disk" --initrd "$XFS"
	lost=
	on_ready() { :; }
	check_qcow2 "$WORK/k.qcow2" 3
	boots 0 3 60 disk_recover microvm vmlinuz 1 --net none --disk "$disk" --initrd "$XFS"
	qcow2 convert -f qcow2 -O raw "$WORK/k.qcow2" "$WORK/flat" || fail "vmm disk convert"
}

case_disk_qcow2_killed_ext4()
{
	new_disk
	killed ext4
	e2fsck -fn "$WORK/flat" >>"$WORK/stderr" 2>&1 || fail "e2fsck finds errors"
}

case_disk_qcow2_killed_xfs()
{
	rm -f "$WORK/disk"
	truncate -s 320M "$WORK/disk"
	mkfs.xfs -q "$WORK/disk" >>"$WORK/stderr" 2>&1 || fail "mkfs.xfs"
	killed xfs libcrc32c,xfs
	xfs_repair -n -f "$WORK/flat" >>"$WORK/stderr" 2>&1 || fail "xfs_repair finds errors"
	rm -f "$WORK/disk" "$WORK/k.qcow2" "$WORK/flat"
}

case_net_pc()
{
	words="vmm.sum=$sum"
	boots 0 6 90 net pc vmlinuz 1 --net user
}

case_net_microvm()
{
	words="vmm.sum=$sum"
	boots 0 6 90 net microvm vmlinux 1 --net user
}

case_net_host_allow()
{
	words="vmm.sum=$sum"
	boots 0 3 90 net_host microvm vmlinuz 1 --net user,host=allow
}

case_net_inbound()
{
	on_ready()
	{
		[ "$(timeout 20 wget -q -O - http://127.0.0.1:2280/cgi-bin/hello)" = "from the guest" ] ||
			fail "no answer through the forwarded port"
	}
	words="vmm.sum=$sum"
	boots 0 7 90 net,inbound pc vmlinuz 2 --net user,fwd=tcp:127.0.0.1:2280:80
}

case_devices_pc()
{
	boots 0 5 60 rng,balloon,console pc vmlinuz 1 --net none --rng --balloon --console "file:$WORK/hvc" \
		--console "file:$WORK/port,name=org.vmm.test"
	grep -q 'HVC hello from hvc0' "$WORK/hvc" || fail "nothing came out of hvc0"
	grep -q 'PORT org.vmm.test' "$WORK/hvc" || fail "the second port has another name"
}

case_devices_microvm()
{
	boots 0 5 60 rng,balloon,console microvm vmlinux 1 --net none --rng --balloon \
		--console "file:$WORK/hvc" --console "file:$WORK/port,name=org.vmm.test"
	grep -q 'HVC hello from hvc0' "$WORK/hvc" || fail "nothing came out of hvc0"
}

case_status_reboot_pc() { boots 100 0 60 reboot pc vmlinuz 1 --net none; }
case_status_reboot_microvm() { boots 100 0 60 reboot microvm vmlinux 2 --net none; }
case_status_panic_pvpanic() { boots 101 0 60 sysrq_panic pc vmlinuz 1 --net none; }

case_status_panic_console()
{
	words=vmm.without=pvpanic,pvpanic-mmio
	boots 101 0 60 init_dies microvm vmlinux 1 --net none
}

case_status_value()
{
	words=vmm.value=0x2a
	boots 42 0 60 report pc vmlinuz 1 --net none
}

# reboot=triple: the kernel resets by loading an empty interrupt table.
case_status_triple_fault()
{
	words=reboot=triple
	boots 102 0 60 reboot pc vmlinuz 1 --net none
}

case_status_timeout()
{
	boots 124 0 15 sleep microvm vmlinux 1 --net none
}

case_reboot_restarts()
{
	new_disk
	boots 0 1 90 restarts pc vmlinuz 1 --net none --disk "$WORK/disk" --on-reboot=restart
}

# SIGTERM presses it; the guest powers off in good order, and the status still tells of the signal.
power_button()
{
	on_ready() { kill -TERM $vmm_pid; }
	boots 143 1 60 button "$1" vmlinuz 1 --net none
	grep -q 'reboot: Power down' "$WORK/transcript" || fail "the guest did not power off"
}

case_power_button_pc() { power_button pc; }
case_power_button_microvm() { power_button microvm; }

# --- running them ---

wanted()
{
	[ -n "$ONLY" ] || return 0
	for pattern in $ONLY; do
		# shellcheck disable=SC2254
		case $1 in
		$pattern) return 0 ;;
		esac
	done
	return 1
}

# Runs in a subshell: what a case sets is gone after it.
run_case()
(
	case=$1 why='' words='' lost=''
	rm -f "$WORK/transcript" "$WORK/stderr"
	: >"$WORK/transcript"
	began=$(now)
	"case_$(echo "$case" | tr - _)"
	took=$(seconds $(($(now) - began)))
	if [ -z "$why" ]; then
		result "$case" pass "$took"
		return
	fi
	result "$case" fail "$took" "$why"
	tail -n 25 "$WORK/transcript" "$WORK/stderr" 2>/dev/null | sed 's/^/LOG /' >>"$RESULTS"
)

serve()
{
	ip addr add $SERVER/32 dev lo
	mkdir -p "$WORK/www"
	dd if=/dev/urandom of="$WORK/www/random" bs=1M count=2 2>/dev/null
	sum=$(sha256sum "$WORK/www/random" | cut -c 1-64)
	dnsd 127.0.0.1 53 bed.test $SERVER
	httpd -p $SERVER:8080 -h "$WORK/www"
	httpd -p 127.0.0.1:8000 -h "$WORK/www"
}

cr=$(printf '\r')
serve
for c in $(sed -n 's/^case_\([a-z0-9_]*\)().*/\1/p' "$0" | tr _ -); do
	if wanted "$c"; then
		run_case "$c"
	fi
done
