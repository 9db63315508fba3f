/*
 * report VALUE: end the machine this guest runs on with that status, through the debug-exit port 0xf4. Comes back
 * only if there is no such device.
 */
#include <stdio.h>
#include <stdlib.h>
#include <sys/io.h>

#define DEBUG_EXIT_PORT 0xf4

int main(int argc, char **argv)
{
	if (argc != 2 || ioperm(DEBUG_EXIT_PORT, 4, 1) < 0) {
		fprintf(stderr, "usage: report VALUE, as root\n");
		return 2;
	}
	outl((unsigned)strtoul(argv[1], NULL, 0), DEBUG_EXIT_PORT);
	return 1;
}
