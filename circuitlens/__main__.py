"""The command line as a module, as ``accelerate launch --module circuitlens`` needs it."""

from circuitlens.cli import main

if __name__ == "__main__":
    main()
