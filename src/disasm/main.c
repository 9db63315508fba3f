/*
 * vmm-disasm: instruction bytes to text, for the report on a KVM failure. A program of its own, so that
 * the VM process does not carry a disassembler. Reads an address (8 bytes, little-endian) and the bytes
 * from descriptor 3, writes lines to descriptor 4.
 */
#include <capstone/capstone.h>
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define MAX_INSN 3

int main(void)
{
	uint8_t in[8 + 64];
	ssize_t n = read(3, in, sizeof(in));
	cs_insn *insn;
	uint64_t rip;
	size_t count;
	csh handle;

	if (n <= 8 || cs_open(CS_ARCH_X86, CS_MODE_64, &handle) != CS_ERR_OK)
		return 1;
	memcpy(&rip, in, 8);
	count = cs_disasm(handle, in + 8, (size_t)n - 8, rip, MAX_INSN, &insn);
	for (size_t i = 0; i < count; i++)
		dprintf(4, "  %#" PRIx64 ": %s %s\n", insn[i].address, insn[i].mnemonic, insn[i].op_str);
	if (count)
		cs_free(insn, count);
	cs_close(&handle);
	return 0;
}
