#include <stdlib.h>
#include "cli/cli.h"

/* The only exit() of the program. */
int main(int argc, char **argv)
{
	exit(cli_main(argc, argv));
}
