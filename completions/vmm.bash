# bash completion for vmm
_vmm()
{
	local cur prev words
	cur=${COMP_WORDS[COMP_CWORD]}
	prev=${COMP_WORDS[COMP_CWORD-1]}
	case $prev in
	--kernel|-k|--initrd|-i|--module|--disk|-d|--result|-r)
		COMPREPLY=($(compgen -f -- "$cur"))
		compopt -o filenames
		return ;;
	--machine|-M) words="pc microvm" ;;
	--net|-n) words="user none" ;;
	--serial|-s|--console|--debugcon) words="stdio none null file: append: pipe: unix: fd:" ;;
	--on-reboot) words="exit restart" ;;
	--on-panic) words="exit ignore" ;;
	--engine) words="auto io_uring epoll" ;;
	--sandbox) words="on off log" ;;
	--device) words="help blk net console rng balloon" ;;
	--debug-exit) words="0xf4 0xf4,qemu off" ;;
	--kernel-entry) words="auto unpack bzimage bzimage32 pvh linux64 multiboot multiboot2 flat16 flat32 flat64" ;;
	doctor) words="--json --help" ;;
	*)
		words="--kernel --initrd --module --cmdline --append --disk --net --mem --cpus --cpu --machine
			--serial --console --rng --balloon --device --debug-exit --debugcon --testdev --timeout --on-reboot
			--on-panic --grace --result --kernel-entry --load-address --hugepages --die-with-parent --engine
			--poll-us --sandbox --quiet --verbose --help --version"
		[ "$COMP_CWORD" = 1 ] && words="run doctor help version $words" ;;
	esac
	COMPREPLY=($(compgen -W "$words" -- "$cur"))
}
complete -F _vmm vmm
