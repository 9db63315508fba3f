/* Entry in 32-bit protected mode without paging: Multiboot 1 and 2, flat32. The kernel is 32-bit code. */
	.section .head, "ax"
#ifdef MULTIBOOT1
	.balign 4
	.long 0x1badb002, 3, -(0x1badb002 + 3)
#endif
#ifdef MULTIBOOT2
	.balign 8
mb2:	.long 0xe85250d6, 0, mb2_end - mb2, -(0xe85250d6 + (mb2_end - mb2))
	.word 1, 0
	.long 20, 1, 3, 6
	.balign 8
	.word 6, 0
	.long 8
	.balign 8
	.word 0, 0
	.long 8
mb2_end:
#endif
	.text
	.globl _start
_start:
	mov $stack_end, %esp
	push %esi
	push %ebx
	push %eax
	call payload
	push %eax
	call leave

	.bss
	.balign 16
	.space 8192
stack_end:
	.section .note.GNU-stack, "", @progbits
