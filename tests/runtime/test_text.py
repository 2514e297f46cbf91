from tubelet.runtime.text import text_table


def test_columns_are_aligned():
    assert text_table([["a", "x", "1"], ["bbb", "yy", "22"]]).splitlines() == ["a    x   1", "bbb  yy  22"]


def test_header_is_separated_by_a_rule_and_numbers_are_aligned_right():
    table = text_table([["a", "1.0"], ["bb", "10.0"]], ["name", "%"], align_right=True)
    assert table.splitlines() == ["name     %", "----------", "a      1.0", "bb    10.0"]


def test_rows_may_be_shorter_and_headings_wider_than_the_first_column():
    table = text_table([["a long heading"], ["a", "1"], ["b", "22", "3"]])
    assert table.splitlines() == ["a long heading", "a  1", "b  22  3"]


def test_table_without_rows():
    assert text_table([]) == ""
    assert text_table([], ["name", "%"]).splitlines() == ["name  %", "-------"]
