from flax_qformer.commands.main import main

main()
