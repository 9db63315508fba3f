/*
 * The smallest bzImage: a boot sector, one setup sector, and a "compressed kernel" that says which entry
 * was taken (32-bit at its start, 64-bit at 0x200), checks the zero page and command line, and leaves.
 */
	.code32
	.text
	.globl _start
_start:
	.org 0x1f1
	.byte 1                 /* setup_sects */
	.word 0                 /* root_flags */
	.long (end - kernel + 15) / 16
	.word 0, 0xffff, 0
	.word 0xaa55
	.byte 0xeb, 0x66        /* jump over the header: it ends at 0x268 */
	.ascii "HdrS"
	.word 0x20f             /* protocol 2.15 */
	.long 0
	.word 0, 0
	.byte 0, 1              /* loadflags: LOADED_HIGH */
	.word 0
	.long 0x100000          /* code32_start */
	.long 0, 0, 0
	.word 0
	.byte 0, 0
	.long 0                 /* cmd_line_ptr */
	.long 0x7fffffff        /* initrd_addr_max */
	.long 0x1000            /* kernel_alignment */
	.byte 0, 12             /* not relocatable, min_alignment */
	.word 1                 /* xloadflags: XLF_KERNEL_64 */
	.long 255               /* cmdline_size */
	.long 0
	.quad 0
	.long 0, 0              /* payload */
	.quad 0
	.quad 0x100000          /* pref_address */
	.long 0x10000           /* init_size */
	.long 0, 0
	.org 0x400
kernel:
	mov $0x100000 + (text32 - kernel), %edi
	jmp report
	.org 0x600
	.code64
	mov $0x100000 + (text64 - kernel), %edi
report:                         /* the same bytes mean the same in both modes */
	mov $0x3f8, %edx
1:	mov (%rdi), %al
	test %al, %al
	jz 2f
	out %al, (%dx)
	add $1, %edi
	jmp 1b
2:	mov $1, %al
	cmpl $0x53726448, 0x202(%rsi)
	jne 3f
	mov 0x228(%rsi), %edi
	cmpl $0x74736574, (%rdi)        /* "test" */
	jne 3f
	cmpw $0x313d, 4(%rdi)           /* "=1" */
	jne 3f
	xor %eax, %eax
3:	out %al, $0xf4
4:	cli
	hlt
	jmp 4b
text32:	.asciz "hello bzimage 32-bit entry\n"
text64:	.asciz "hello bzimage 64-bit entry\n"
end:
	.section .note.GNU-stack, "", @progbits
