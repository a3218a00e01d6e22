for d in "0" 1 2 3 4 5 6 7 8 9 10 11 12 13 15 16 17 100 101 102 "200 -n 1" "200 -n 12" "201 -n 2" "201 -n 5" "202 -n 2" "202 -n 5" "203 -n 0" "203 -n 32" 204 205 206 "207 -n 1" 208 209; do
s=$( { TIMEFORMAT=%U; time dieharder -g 200 -d $d -p 2 -k 2 -D test_name -D ntuple -D tsamples -D psamples -D pvalues -D assessment >>t.out; } 2>&1 ); echo "$d: $s"; done
