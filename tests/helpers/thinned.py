"""Which cases of long tests run in the suite, so that it stays within minutes on two cores; all run with `-m slow`."""

EVERY_NTH = {
    "test_a_corruption_loads_as_specified_or_is_one_sentence": 4,
    "test_a_prediction_is_what_is_measured": 9,
    "test_a_rank_that_dies_or_hangs_ends_the_others": 2,
    "test_a_resumed_run_is_the_run_it_would_have_been": 2,
    "test_a_resumed_run_takes_the_same_steps": 2,
    "test_a_step_adds_the_loss_of_all_its_tokens": 3,
    "test_an_accumulation_window_equals_the_big_batch": 12,
    "test_an_error_in_a_callback_ends_the_run_saved_and_resumed_it_is_the_run_it_would_have_been": 2,
    "test_batch_size_changes_no_metric": 2,
    "test_compiled_is_eager": 6,
    "test_every_command_says_so": 2,
    "test_every_contender_takes_steps_and_ranks_pairs_by_its_own_reward": 3,
    "test_every_memory_mode_takes_the_steps_of_plain": 2,
    "test_every_method_learns_its_train_split": 12,
    "test_every_mode_trains_on_them": 2,
    "test_every_token_of_every_pair_matches_the_oracle": 8,
    "test_gradients_do_not_depend_on_the_path": 4,
    "test_greedy_replies_are_those_of_one_prompt_at_a_time": 2,
    "test_it_can_be_traced": 2,
    "test_it_is_saved_resumed_and_generated_with": 2,
    "test_log_probs_are_pefts_and_the_adapter_comes_back_and_merges": 2,
    "test_memory_modes_change_no_number": 4,
    "test_right_functions_are_proven": 3,
    "test_segments_change_nothing": 4,
    "test_the_figures_are_those_the_run_closed_with": 2,
    "test_the_loss_of_a_step_is_the_papers": 5,
    "test_the_reference_follows_the_policys_weights": 2,
    "test_two_ranks_are_one_run_and_one_goes_on_for_two": 2,
    "test_whatever_is_trained": 3,
}
"""Tests of many cases, in the order in which they are collected: every n-th, from the first."""

WITH_THE_SLOW = {
    "test_a_hangup_that_nohup_has_switched_off_stays_off",
    "test_a_line_of_5_mb",
    "test_a_models_template",
    "test_a_run_that_is_killed_anywhere_ends_with_the_same_bytes",
    "test_a_fused_model_has_the_log_probs_of_the_adapters",
    "test_fit_takes_a_config",
    "test_generate_and_server_give_the_same_text",
    "test_killed_at_random_and_resumed_until_done",
    "test_models_inside_of_others_and_layers_of_several_kinds",
    "test_processes_that_write_the_same_store_at_once_all_have_it",
    "test_the_reference_adapter_comes_back",
    "test_the_same_command_gives_the_same_and_runs_nothing_twice",
}
"""Tests that take longer than they are likely to find something that others do not."""

TOGETHER = {
    "tests/cli/test_chat.py": "taught adapters",
    "tests/cli/test_evaluate.py": "taught adapters",
    "tests/doctor/": "an examination",
    "tests/compare/test_report.py": "a comparison",
    "tests/compare/test_runner.py": "a comparison",
    "tests/reporting/test_html_page_in_browser.py": "a comparison",
    "tests/scripts/test_docs_tables.py": "a comparison",
}
"""Beginnings of tests' names, and what such tests share in one process; see `conftest.py`."""
