/* Started by which protocol, with what: built once for each, -DHELLO_*. */
#include "rt.h"

int payload(unsigned long ax, unsigned long bx, unsigned long si)
{
	struct boot_facts f = { 0 };

	say("hello " HELLO "\n");
#if defined(HELLO_MULTIBOOT1)
	CHECK((uint32_t)ax == 0x2badb002);
	facts_multiboot1(&f, bx);
#elif defined(HELLO_MULTIBOOT2)
	CHECK((uint32_t)ax == 0x36d76289);
	facts_multiboot2(&f, bx);
#elif defined(HELLO_LINUX)
	CHECK(si);
	facts_linux(&f, si);
#else
	facts_pvh(&f, bx);
#endif
	(void)ax, (void)bx, (void)si;
	facts_check(&f);
	return 1;
}
