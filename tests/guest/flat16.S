/* A boot sector: real mode, CS:IP is where it was loaded, SP grows down from below it. */
	.code16
	.globl _start
_start:
	mov %cs, %ax
	mov %ax, %ds
	call 1f
1:	pop %si
	add $(text - 1b), %si
	mov $0x3f8, %dx
2:	lodsb
	test %al, %al
	jz 3f
	out %al, (%dx)
	jmp 2b
3:	mov %cr0, %eax
	and $1, %al             /* status 1 if this is protected mode */
	out %al, $0xf4
4:	cli
	hlt
	jmp 4b
text:	.asciz "hello flat16\n"
	.section .note.GNU-stack, "", @progbits
