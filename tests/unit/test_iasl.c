/* ACPI tables as iasl, the reference implementation, reads them: disassembled and compiled again, no warnings. */
#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include "unit.h"
#include "x86_machine.h"

static void save_table(const char *dir, const char *name, gpa_t t)
{
	char path[300];
	uint32_t len = rd(t + 4, 4);
	FILE *f;

	snprintf(path, sizeof(path), "%s/%s.aml", dir, name);
	f = fopen(path, "w");
	ck_assert_ptr_nonnull(f);
	ck_assert_uint_eq(fwrite(gmem_at(&vm.mem, t, len), 1, len, f), len);
	fclose(f);
}

static void disassemble_and_compile(const char *dir, const char *name)
{
	char cmd[900];

	snprintf(cmd, sizeof(cmd),
		"cd %s && iasl -d %s.aml >d.log 2>&1 && ! grep -iE 'error|warning' d.log && "
		"iasl -we -p again %s.dsl >c.log 2>&1 && grep -q ' 0 Errors, 0 Warnings' c.log || "
		"{ cat d.log c.log; false; }",
		dir, name, name);
	ck_assert_msg(system(cmd) == 0, "iasl does not like %s", name);
}

static void ask_iasl(const char *dir)
{
	static const char *const names[] = { "FACP", "APIC", "MCFG" };

	setup();
	save_table(dir, "DSDT", rd(find_table("FACP") + 40, 4));
	disassemble_and_compile(dir, "DSDT");
	for (size_t i = 0; i < ARRAY_LEN(names); i++) {
		if (!find_table(names[i]))
			continue;
		save_table(dir, names[i], find_table(names[i]));
		disassemble_and_compile(dir, names[i]);
	}
}

START_TEST(test_iasl_reads_and_recompiles_every_table)
{
	char dir[] = "/tmp/vmm-acpi-XXXXXX", cmd[64];

	if (system("command -v iasl >/dev/null")) {
		puts("skipped: iasl (package acpica-tools) is not installed");
		exit(77);
	}
	ck_assert_ptr_nonnull(mkdtemp(dir));
	make(MACHINE_PC, 64 << 20, 2, 0);
	ask_iasl(dir);
	done();
	make(MACHINE_MICROVM, 5ull << 30, 300, 32);
	ask_iasl(dir);
	done();
	snprintf(cmd, sizeof(cmd), "rm -r %s", dir);
	ck_assert_int_eq(system(cmd), 0);
}
END_TEST

UNIT_MAIN("iasl", test_iasl_reads_and_recompiles_every_table)
