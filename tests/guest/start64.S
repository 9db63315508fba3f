/*
 * Entry of 64-bit payloads. Linux's 64-bit protocol and flat64 come in long mode; PVH and Multiboot in 32-bit
 * protected mode, from where long mode is entered with the first GiB mapped to itself.
 */
	.section .head, "ax"
#ifdef MULTIBOOT1
	.balign 4
	.long 0x1badb002, 3, -(0x1badb002 + 3)
#endif
#ifdef PVH
	.section .note.Xen, "a", @note
	.balign 4
	.long 4, 4, 18          /* XEN_ELFNOTE_PHYS32_ENTRY */
	.asciz "Xen"
	.long _start
#endif
	.section .head, "ax"
	.globl _start
_start:
#if defined(MULTIBOOT1) || defined(PVH)
	.code32
	mov $stack_end, %esp
	mov %eax, %ebp
	movl $(pdpt + 3), pml4
	movl $(pd + 3), pdpt
	mov $0x83, %eax
	xor %ecx, %ecx
1:	mov %eax, pd(, %ecx, 8)
	add $0x200000, %eax
	inc %ecx
	cmp $512, %ecx
	jne 1b
	mov $pml4, %eax
	mov %eax, %cr3
	mov $0x20, %eax
	mov %eax, %cr4
	mov $0xc0000080, %ecx
	rdmsr
	or $0x100, %eax
	wrmsr
	mov %cr0, %eax
	or $0x80000001, %eax
	mov %eax, %cr0
	lgdt gdtr
	ljmp $8, $long_mode
	.code64
long_mode:
	mov $16, %eax
	mov %eax, %ds
	mov %eax, %es
	mov %eax, %ss
	mov %ebp, %edi
	mov %ebx, %ebx
	mov %rbx, %rsi
	xor %edx, %edx
#else
	mov %rax, %rdi
	mov %rsi, %rdx
	mov %rbx, %rsi
#endif
	mov $stack_end, %rsp
	call payload
	mov %eax, %edi
	call leave

#if defined(MULTIBOOT1) || defined(PVH)
	.data
	.balign 8
gdt:	.quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff
gdtr:	.word 23
	.long gdt
#endif
	.bss
	.balign 4096
#if defined(MULTIBOOT1) || defined(PVH)
pml4:	.space 4096
pdpt:	.space 4096
pd:	.space 4096
#endif
	.space 8192
stack_end:
	.section .note.GNU-stack, "", @progbits
