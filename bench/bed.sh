#!/bin/sh
# Inside the emulated bed: how long the stock kernel takes from exec to init, by who starts it. A line each:
# BOOT NAME HUNDREDTHS. The programs take turns.
cmdline='quiet console=ttyS0 vmm.steps=ready'

now()
{
	read -r up _ </proc/uptime
	echo "${up%.*}${up#*.}"
}

# boot NAME COMMAND…: from exec to the first words of init.
boot()
{
	name=$1
	shift
	rm -f $WORK/console
	mkfifo $WORK/console
	began=$(now)
	timeout 60 "$@" </dev/null >$WORK/console 2>$WORK/stderr &
	while IFS= read -r line; do
		case $line in
		*"READY init"*) echo "BOOT $name $(($(now) - began))" >$RESULTS ;;
		esac
	done <$WORK/console
	wait
}

qemu()
{
	name=$1 machine=$2
	shift 2
	boot "$name" /bed/qemu -L /bed/firmware -M "$machine" -accel kvm -cpu max -m 256 -nodefaults -display none \
		-no-reboot -serial stdio -kernel $KERNELS/vmlinuz -initrd $INITRD -append "$cmdline" "$@"
}

vmm()
{
	name=$1
	shift
	boot "$name" $VMM --kernel $KERNELS/vmlinuz --initrd $INITRD --mem 256M --net none --cmdline "$cmdline" "$@"
}

for turn in 1 2 3; do
	vmm vmm
	vmm own-bzimage-entry --kernel-entry=bzimage
	qemu qemu-q35 q35
	qemu qemu-microvm microvm,acpi=on
done
