from uffd_vm.cli import main

if __name__ == "__main__":
    main(prog_name="python -m uffd_vm")
