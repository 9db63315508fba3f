# bash completion for vmm
# After FILE in --disk. $1: all of it so far; cur: what bash makes of it, which cuts words at = and : too.
_vmm_disk_keys()
{
	local last=${1##*,} keys

	case $last in
	fault=*:*:*) keys="at= every= times= sector= p=" last=${last##*:} ;;
	fault=*:*) keys="eio enospc timeout torn" last=${last##*:} ;;
	fault=* | delay=*) keys="read: write: flush: discard:" last=${last#*=} ;;
	werror=*) keys="report stop enospc ignore" last=${last#*=} ;;
	rerror=*) keys="report stop ignore" last=${last#*=} ;;
	cache=*) keys="writeback none writethrough unsafe" last=${last#*=} ;;
	log=*) last=${last#*=} ;;
	*)
		keys="ro snapshot format= cache= discard= backing= iothread= poll_us= queues= serial= fault= seed= timeout= delay= iops= iops_rd= iops_wr=
			bps= bps_rd= bps_wr= iops_max= iops_rd_max= iops_wr_max= bps_max= bps_rd_max= bps_wr_max=
			werror= rerror= log=" ;;
	esac
	[[ $cur == [=:] ]] && cur=
	if [ "$keys" ]; then
		COMPREPLY=($(compgen -P "${cur%"$last"}" -W "$keys" -- "$last"))
	else
		COMPREPLY=($(compgen -P "${cur%"$last"}" -f -- "$last"))
	fi
	compopt -o nospace
}

_vmm_disk()
{
	local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} words
	if [ "$COMP_CWORD" = 2 ]; then
		COMPREPLY=($(compgen -W "create info check convert resize snapshot commit rebase map compare bench replay formats --help" -- "$cur"))
		return
	fi
	case $prev in
	-f|-O|-F|--format|--out-format|--backing-format|--second-format)
		COMPREPLY=($(compgen -W "$("${COMP_WORDS[0]}" disk formats 2>/dev/null | cut -d' ' -f1)" -- "$cur"))
		return ;;
	--preallocate) words="off metadata falloc full" ;;
	-r|--repair) words="leaks all" ;;
	--output) words="human json" ;;
	--cache) words="writeback writethrough unsafe" ;;
	--sandbox) words="on off log" ;;
	*)
		if [[ $cur != -* ]]; then
			COMPREPLY=($(compgen -f -- "$cur"))
			compopt -o filenames
			return
		fi
		words=$("${COMP_WORDS[0]}" disk "${COMP_WORDS[2]}" --help 2>/dev/null | grep -o -- '--[a-z-]*') ;;
	esac
	COMPREPLY=($(compgen -W "$words" -- "$cur"))
}

_vmm()
{
	local cur prev words line=${COMP_LINE:0:COMP_POINT}
	if [ "$COMP_CWORD" -gt 1 ] && [ "${COMP_WORDS[1]}" = disk ]; then
		_vmm_disk
		return
	fi
	cur=${COMP_WORDS[COMP_CWORD]}
	prev=${COMP_WORDS[COMP_CWORD-1]}
	if [[ $line =~ [[:space:]](--disk|-d)[[:space:]]+([^[:space:]]+,[^[:space:]]*)$ ]]; then
		_vmm_disk_keys "${BASH_REMATCH[2]}"
		return
	fi
	case $prev in
	--kernel|-k|--initrd|-i|--module|--disk|-d|--result|-r|--log|--base|--out)
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
	disk) words="create info check convert resize snapshot commit rebase map compare bench replay formats" ;;
	replay) words="--log --base --size --out --at --every-flush --every-fua --torn --seed --count --exec --keep-failed --list
			--json --help" ;;
	*)
		words="--kernel --initrd --module --cmdline --append --disk --net --mem --cpus --cpu --machine
			--serial --console --rng --balloon --device --debug-exit --debugcon --testdev --timeout --on-reboot
			--on-panic --grace --result --kernel-entry --load-address --hugepages --die-with-parent --engine
			--poll-us --sandbox --quiet --verbose --help --version"
		[ "$COMP_CWORD" = 1 ] && words="run disk doctor help version $words" ;;
	esac
	COMPREPLY=($(compgen -W "$words" -- "$cur"))
}
complete -F _vmm vmm
