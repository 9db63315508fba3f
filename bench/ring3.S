/*
 * PVH entry (32-bit protected mode, ebx: start info) to C code in ring 3, which software KVM runs natively:
 * the first 4 GiB mapped to themselves as user pages, interrupts off. The ports are open to it by IOPL 3, and by a
 * task state segment with an empty I/O bitmap, because software KVM asks that one.
 */
	.equ TSS_SIZE, 104 + 8192 + 1

	.section .note.Xen, "a", @note
	.balign 4
	.long 4, 4, 18          /* XEN_ELFNOTE_PHYS32_ENTRY */
	.asciz "Xen"
	.long _start

	.section .head, "ax"
	.code32
	.globl _start
_start:
	mov $stack_end, %esp
	mov $pd, %edi           /* 2048 entries of 2 MiB, user and writable */
	mov $0x87, %eax
	mov $2048, %ecx
1:	mov %eax, (%edi)
	add $8, %edi
	add $0x200000, %eax
	loop 1b
	movl $(pd + 7), pdpt
	movl $(pd + 0x1007), pdpt + 8
	movl $(pd + 0x2007), pdpt + 16
	movl $(pd + 0x3007), pdpt + 24
	movl $(pdpt + 7), pml4
	mov $pml4, %eax
	mov %eax, %cr3
	mov $0x20, %eax         /* PAE */
	mov %eax, %cr4
	mov $0xc0000080, %ecx   /* EFER.LME */
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
	mov %ebx, %edi
	movw $104, tss + 102    /* where the bitmap begins; not a bit of it is set */
	mov $tss, %eax
	mov %ax, gdt_tss + 2
	shr $16, %eax
	mov %al, gdt_tss + 4
	mov %ah, gdt_tss + 7
	mov $0x28, %eax
	ltr %ax
	mov $0x1b, %eax
	mov %eax, %ds
	mov %eax, %es
	pushq $0x1b             /* ss: user data */
	pushq $user_stack_end
	pushq $0x3002           /* IOPL 3, interrupts off */
	pushq $0x23             /* cs: user code */
	pushq $payload
	iretq

	.data
	.balign 8
gdt:	.quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cff3000000ffff, 0x00affb000000ffff
gdt_tss: .quad 0x0000890000000000 + TSS_SIZE - 1, 0
gdtr:	.word 55
	.long gdt
	.bss
	.balign 4096
tss:	.space TSS_SIZE
	.balign 4096
pml4:	.space 4096
pdpt:	.space 4096
pd:	.space 4 * 4096
	.space 4096
stack_end:
	.space 16384
	.balign 16
	.space 8
user_stack_end:
	.section .note.GNU-stack, "", @progbits
